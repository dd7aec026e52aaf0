"""Two models from one config object: what is done to one of them never changes the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from with_heads import output

import hf_polyattn as hp
from hf_polyattn.patching.patched import patched_layers

BASE = {
    "minilm": "AutoModelForMaskedLM",
    "gpt2-zinc": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
}


def twins(model: Any) -> tuple[Any, Any]:
    """Two models with the weights, and the one config object, of a model."""
    pair = [type(model)(model.config).eval() for _ in range(2)]
    for twin in pair:
        twin.load_state_dict(model.state_dict())
        assert twin.config is model.config
    return pair[0], pair[1]


def peft_model(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


TO_ONE: dict[str, Callable[[Any, Path], Any]] = {
    "save_pretrained": lambda one, folder: one.save_pretrained(folder),
    "patched too": lambda one, folder: hp.patch_model(one, "poly5-l1"),
    "patched and unpatched": lambda one, folder: hp.unpatch_model(hp.patch_model(one, "poly5-l1")),
    "config changed": lambda one, folder: setattr(one.config, "polyattn_config", None),
}


# Every action on the smallest, and saving, the usual one, for every model.
CASES = [("llama", action) for action in TO_ONE] + [(name, "save_pretrained") for name in BASE if name != "llama"]


@pytest.mark.parametrize(("name", "action"), CASES)
def test_a_softmax_twin_changes_nothing(name: str, action: str, pretrained: Any, batch: Any, tmp_path: Path) -> None:
    inputs = batch(name)
    one, other = twins(pretrained(name, BASE[name]))
    softmax = output(one, inputs)
    hp.patch_model(other, "poly3")
    expected, written = output(other, inputs), other.config.to_json_string()
    assert not torch.allclose(expected, softmax, rtol=0.01)
    assert torch.equal(output(one, inputs), softmax)
    TO_ONE[action](one, tmp_path)
    assert torch.equal(output(other, inputs), expected)
    assert other.config.to_json_string() == written
    other.save_pretrained(tmp_path / "other")
    assert torch.equal(output(type(other).from_pretrained(tmp_path / "other").eval(), inputs), expected)


def entered(model: Any) -> Any:
    context = hp.softmax_attention(model)
    context.__enter__()
    return context


def configs(model: Any) -> set[int]:
    """The ids of the model's configs."""
    held = (value for part in model.modules() for value in vars(part).values())
    return {id(value) for value in held if isinstance(value, PreTrainedConfig)}


TO_A_COPY: dict[str, Callable[[Any], Any]] = {
    "unpatched": hp.unpatch_model,
    "calibrated": lambda model: hp.calibrate(model, [model.dummy_inputs], progress=False),
    "softmax": entered,
}


@pytest.mark.parametrize(
    ("origin", "action"),
    [("patched", action) for action in TO_A_COPY] + [("loaded", "unpatched"), ("deepcopy", "unpatched")],
)
@pytest.mark.parametrize("name", ["llama", "gpt2-zinc"])
def test_a_model_from_the_config_of_a_patched_one_is_independent(
    name: str, origin: str, action: str, pretrained: Any, batch: Any, tmp_path: Path
) -> None:
    inputs = batch(name)
    one = hp.patch_model(pretrained(name, BASE[name]), "poly3")
    if origin == "loaded":
        one.save_pretrained(tmp_path)
        one = type(one).from_pretrained(tmp_path).eval()
    elif origin == "deepcopy":
        one = copy.deepcopy(one)
    expected, written = output(one, inputs), one.config.to_json_string()
    other = type(one)(one.config).eval()
    other.load_state_dict(one.state_dict())
    assert hp.is_patched(other)
    assert torch.equal(output(other, inputs), expected)
    assert configs(other) == {id(other.config)}  # one, and its own
    assert other.config is not one.config
    kept = TO_A_COPY[action](other)
    assert torch.equal(output(one, inputs), expected)
    assert one.config.to_json_string() == written
    assert not torch.allclose(output(other, inputs), expected, rtol=0.01)
    del kept


def test_a_wrapper_that_holds_the_config_follows(pretrained: Any, batch: Any, tmp_path: Path) -> None:
    wrapped = hp.patch_model(peft_model(pretrained("llama", "AutoModelForCausalLM")), "poly3")
    inner = wrapped.get_base_model()
    assert configs(wrapped) == {id(inner.config)}

    class Around(PreTrainedModel):
        config_class = type(inner.config)
        _supports_sdpa = True

        def __init__(self, model: Any) -> None:
            super().__init__(model.config)
            self.inner = model
            self.post_init()

    one, other = twins(pretrained("llama", "AutoModelForCausalLM"))
    around = hp.patch_model(Around(one), "poly3")
    assert around.config is one.config
    assert not hp.is_patched(other)
    other.save_pretrained(tmp_path)
    assert not hp.is_patched(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert not torch.equal(output(one, batch("llama")), output(other, batch("llama")))


def test_encoder_and_decoder_go_on_sharing_one_config(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "vocab_size": 99, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 20}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    model = hp.patch_model(BartForConditionalGeneration(BartConfig(**sizes, **heads)), "poly3", cross_attention=True)
    model.save_pretrained(tmp_path)
    for again in (model, BartForConditionalGeneration.from_pretrained(tmp_path)):
        assert len(patched_layers(again)) == 3
        assert configs(again) == {id(again.config)}


def test_a_task_head_and_its_model_share_the_copy(pretrained: Any) -> None:
    model = pretrained("minilm", "AutoModelForMaskedLM")
    before = model.config
    assert isinstance(hp.patch_model(model, "poly3"), BertForMaskedLM)
    assert model.config is model.bert.config is model.bert.encoder.layer[0].attention.self.config
    assert model.config is not before
    assert "polyattn" not in before.to_json_string()
