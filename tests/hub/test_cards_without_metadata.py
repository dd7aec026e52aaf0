"""A base model whose card has no metadata, as a folder's README.md often has none: nothing to warn of."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

import hf_polyattn as hp


def test_a_base_model_whose_card_has_no_metadata_is_no_news(
    polynomial: Any, pretrained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = polynomial(pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=1))
    (tmp_path / "README.md").write_text("# Stories\n")
    model.config.name_or_path = model.name_or_path = str(tmp_path)
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(caplog.handler)  # which hands nothing on
    try:
        hp.model_card(model)
        assert "metadata" not in caplog.text
        logging.getLogger("huggingface_hub.repocard").warning("metadata is something else")
        assert "something else" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
