"""Softmax on request, one rule: no way but `unpatch_model` and `softmax_attention`, and no way in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from auto_classes import AUTO_CLASSES
from torch import Tensor
from transformers import AutoConfig, CLIPConfig, CLIPModel, GenerationConfig, pipeline

import hf_polyattn as hp
from hf_polyattn.errors import PatchError

each = pytest.mark.parametrize("name", AUTO_CLASSES)
others = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs)[0]
    return found


@each
@others
def test_a_patched_model_refuses_another_implementation(
    name: str, implementation: str, pretrained: Any, polynomial: Any, batch: Any
) -> None:
    model = polynomial(pretrained(name, AUTO_CLASSES[name], num_hidden_layers=2))
    expected = output(model, batch(name))
    for asked in (implementation, {"": implementation}):
        with pytest.raises(PatchError, match=rf"{implementation}.*unpatch_model\(model\).*softmax_attention"):
            model.set_attn_implementation(asked)
    if hasattr(model, "base_model"):
        with pytest.raises(PatchError, match="unpatch_model"):
            model.base_model.set_attn_implementation(implementation)
    assert torch.equal(output(model, batch(name)), expected)
    model.set_attn_implementation("polyattn")
    assert torch.equal(output(model, batch(name)), expected)
    hp.unpatch_model(model).set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert not torch.allclose(output(model, batch(name)), expected, atol=1e-3)


@pytest.mark.parametrize("way", ["from_pretrained", "config", "from_config", "pipeline"])
def test_a_polynomial_checkpoint_is_not_loaded_as_something_else(
    way: str, pretrained: Any, polynomial: Any, batch: Any, tmp_path: Path
) -> None:
    model = polynomial(pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=1))
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM
    asked = {"attn_implementation": "sdpa"}
    ways = {
        "from_pretrained": lambda: auto.from_pretrained(tmp_path, **asked),
        "config": lambda: auto.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path, **asked)),
        "from_config": lambda: auto.from_config(AutoConfig.from_pretrained(tmp_path), **asked),
        "pipeline": lambda: pipeline("text-generation", str(tmp_path), model_kwargs=asked),
    }
    with pytest.raises(ValueError, match=r"'sdpa' was asked for.*unpatch_model\(model\)"):  # pipeline quotes it
        ways[way]()
    for right in ({}, {"attn_implementation": None}, {"attn_implementation": "polyattn"}):
        assert torch.equal(
            output(auto.from_pretrained(tmp_path, **right), batch("llama")), output(model, batch("llama"))
        )


def test_the_softmax_half_of_a_composite_model_is_free() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=16))
    hp.patch_model(model, "poly3", include="text_model*")
    before = {part: getattr(model.config, part)._attn_implementation for part in ("text_config", "vision_config")}
    assert before["text_config"] == "polyattn"
    with pytest.raises(PatchError, match="unpatch_model"):
        model.set_attn_implementation("eager")
    with pytest.raises(PatchError, match="unpatch_model"):
        model.set_attn_implementation({"text_config": "eager", "vision_config": "eager"})
    for part, implementation in before.items():
        assert getattr(model.config, part)._attn_implementation == implementation
    model.set_attn_implementation({"vision_config": "eager"})
    assert model.config.text_config._attn_implementation == "polyattn"
    assert model.config.vision_config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["gpt2-zinc", "llama"])
def test_continuous_batching_has_an_error_of_its_own(name: str, pretrained: Any, polynomial: Any) -> None:
    model = polynomial(pretrained(name, AUTO_CLASSES[name], num_hidden_layers=1))
    with pytest.raises(PatchError, match=rf"{type(model).__name__} has polynomial attention.*model\.generate"):
        model.generate_batch([[3, 4, 5]], GenerationConfig(max_new_tokens=2))
    assert model.config._attn_implementation == "polyattn"
    with pytest.raises(PatchError, match=r"model\.generate"):
        model.init_continuous_batching()
