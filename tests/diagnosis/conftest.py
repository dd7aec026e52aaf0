"""The Llama, calibrated and about to be trained, and what it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from hf_polyattn import calibrate, patch_model


@pytest.fixture
def inputs(batch: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    found = batch("llama", count=3, length=24)
    return {**found, "labels": found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)}


@pytest.fixture
def llama(pretrained: Callable[..., Any], inputs: dict[str, Tensor]) -> Any:
    model = patch_model(pretrained("llama", "AutoModelForCausalLM"), "poly4-l1")
    calibrate(model, [inputs], progress=False)
    return model.train()
