"""A config that asks for attention weights: a polynomial model has them, keeps the wish and is saved with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from auto_classes import AUTO_CLASSES
from transformers import AutoConfig

import hf_polyattn as hp

each = pytest.mark.parametrize("name", AUTO_CLASSES)


@each
@torch.no_grad()
def test_a_model_that_returns_attentions_is_patched_saved_and_loaded(
    name: str, pretrained: Any, polynomial: Any, batch: Any, tmp_path: Path
) -> None:
    options = {"num_hidden_layers": 2, "attn_implementation": "eager", "output_attentions": True}
    model = polynomial(pretrained(name, AUTO_CLASSES[name], **options))
    expected = model(**batch(name)).attentions
    assert len(expected) == 2
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, AUTO_CLASSES[name]).from_pretrained(tmp_path)
    assert loaded.config.output_attentions
    for found, weights in zip(loaded(**batch(name)).attentions, expected, strict=True):
        assert torch.equal(found, weights)
    with hp.softmax_attention(model):
        assert not torch.allclose(model(**batch(name)).attentions[0], expected[0], atol=1e-3)
    hp.unpatch_model(model).save_pretrained(tmp_path / "softmax")  # eager, as it was
    assert AutoConfig.from_pretrained(tmp_path / "softmax").output_attentions


@each
@torch.no_grad()
def test_attentions_can_be_asked_for_when_a_model_is_loaded_or_patched(
    name: str, pretrained: Any, polynomial: Any, batch: Any, tmp_path: Path
) -> None:
    model = polynomial(pretrained(name, AUTO_CLASSES[name], num_hidden_layers=2))
    model.save_pretrained(tmp_path)
    expected = model(**batch(name), output_attentions=True).attentions
    loaded = getattr(transformers, AUTO_CLASSES[name]).from_pretrained(tmp_path, output_attentions=True)
    model.config.output_attentions = True
    for asked in (loaded, model):
        for found, weights in zip(asked(**batch(name)).attentions, expected, strict=True):
            assert torch.equal(found, weights)
        asked.save_pretrained(tmp_path / "again")


def test_softmax_that_has_no_weights_is_refused_as_ever(pretrained: Any) -> None:
    model = pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=1, attn_implementation="sdpa")
    with pytest.raises(Exception, match="set it to 'eager'"):
        model.config.output_attentions = True
    model.config._output_attentions = True
    with pytest.raises(Exception, match="set it to 'eager'"):
        model.config.validate()
    with pytest.raises(Exception, match="set it to 'eager'"):
        transformers.LlamaConfig(attn_implementation="sdpa", output_attentions=True)


def test_configs_imported_before_this_package_know_it_too(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = """
from transformers import BertConfig, BertModel
sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64, vocab_size=99)
model = BertModel(BertConfig(**sizes, attn_implementation="eager", output_attentions=True))
import hf_polyattn, sys
hf_polyattn.patch_model(model, "poly3").save_pretrained(sys.argv[1])
print(BertModel.from_pretrained(sys.argv[1]).config.output_attentions)
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"
