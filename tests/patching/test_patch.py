"""Patching changes attention and nothing else, and unpatching leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
)
from with_heads import fingerprint, heads, output

import hf_polyattn as hp
from hf_polyattn.patching.governing import reconfigure
from hf_polyattn.patching.patched import patched_layers

# ---------------------------------------------------------------- patch and unpatch


@heads
def test_unpatch_restores_the_model_to_the_bit(name: str, head: str, pretrained: Any, batch: Any) -> None:
    model, inputs = pretrained(name, head), batch(name)
    weights, before, softmax = copy.deepcopy(model.state_dict()), fingerprint(model), output(model, inputs)

    assert hp.patch_model(model, "poly3") is model
    assert hp.is_patched(model)
    polynomial = output(model, inputs)
    assert (polynomial - softmax).abs().max() > 1e-2 * softmax.abs().max()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())

    assert hp.unpatch_model(model) is model
    assert not hp.is_patched(model)
    assert torch.equal(output(model, inputs), softmax)
    assert fingerprint(model) == before
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


@heads
def test_softmax_attention_runs_the_original_to_the_bit(name: str, head: str, pretrained: Any, batch: Any) -> None:
    model, inputs = pretrained(name, head), batch(name)
    softmax = output(model, inputs)
    hp.patch_model(model, "poly3")
    polynomial = output(model, inputs)
    with hp.softmax_attention(model):
        assert torch.equal(output(model, inputs), softmax)
    assert torch.equal(output(model, inputs), polynomial)
    assert not torch.equal(polynomial, softmax)


def test_softmax_attention_ends_with_an_exception(pretrained: Any, batch: Any) -> None:
    model, inputs = hp.patch_model(pretrained("gpt2-zinc"), "poly3"), batch("gpt2-zinc")
    polynomial = output(model, inputs)
    inside: list[Tensor] = []

    def interrupted() -> None:
        with hp.softmax_attention(model):
            inside.append(output(model, inputs))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert not torch.equal(inside[0], polynomial)
    assert torch.equal(output(model, inputs), polynomial)


def test_softmax_attention_nests(pretrained: Any, batch: Any) -> None:
    model, inputs = pretrained("gpt2-zinc"), batch("gpt2-zinc")
    softmax = output(model, inputs)
    hp.patch_model(model, "poly3")
    with hp.softmax_attention(model):
        with hp.softmax_attention(model):
            pass
        assert torch.equal(output(model, inputs), softmax)
    assert not torch.equal(output(model, inputs), softmax)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_unpatch_returns_to_the_implementation_that_was_chosen(
    implementation: str, pretrained: Any, batch: Any
) -> None:
    model = pretrained("llama", "AutoModelForCausalLM", attn_implementation=implementation)
    softmax = output(model, batch("llama"))
    hp.unpatch_model(hp.patch_model(model, "poly3"))
    assert model.config._attn_implementation == implementation
    assert torch.equal(output(model, batch("llama")), softmax)


@pytest.mark.parametrize("action", [hp.unpatch_model, lambda model: hp.softmax_attention(model).__enter__()])
def test_a_softmax_model_cannot_be_unpatched(action: Any, pretrained: Any) -> None:
    with pytest.raises(hp.PatchError, match=r"GPT2Model is not patched; call patch_model"):
        action(pretrained("gpt2-zinc"))


def test_the_same_config_again_changes_nothing(pretrained: Any, polynomial: Any) -> None:
    model = polynomial(pretrained("gpt2-zinc"), "poly3")
    children = [layer for _, layer in patched_layers(model)]
    trained = [layer.coefficients.clone() for layer in children]
    assert hp.patch_model(model, "poly3") is model
    assert [layer for _, layer in patched_layers(model)] == children
    assert all(torch.equal(layer.coefficients, before) for layer, before in zip(children, trained, strict=True))


def test_the_spec_of_a_calibrated_model_is_the_same_config(pretrained: Any) -> None:
    model = hp.patch_model(pretrained("gpt2-zinc"), "poly3")
    reconfigure(model, interval=True, clamp=True, key_shift=True)  # as calibration does
    assert hp.patch_model(model, "poly3") is model
    assert all(layer.config.interval for _, layer in patched_layers(model))
    assert model.config.polyattn_config["interval"] is True
    with pytest.raises(hp.PatchError, match="already patched"):
        hp.patch_model(model, "poly3-l1")


@pytest.mark.parametrize("other", ["poly4", "poly3-l1", hp.PolyAttentionConfig("poly3", learnable=False)], ids=str)
def test_another_config_on_a_patched_model_raises(other: Any, pretrained: Any) -> None:
    model = hp.patch_model(pretrained("gpt2-zinc"), "poly3")
    with pytest.raises(hp.PatchError, match="already patched"):
        hp.patch_model(model, other)
    assert {str(layer.config) for _, layer in patched_layers(model)} == {"poly3"}


# ---------------------------------------------------------------- which modules


def layers_of(model: Any) -> list[int]:
    return [int(next(part for part in path.split(".") if part.isdigit())) for path, _ in patched_layers(model)]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"layers": [1, 3]}, [1, 3]),
        ({"include": ["*.h.0.*", "*.h.2.*"]}, [0, 2]),
        ({"exclude": "*.h.1.attn"}, [0, 2, 3]),
        ({"layers": range(1, 4), "exclude": ["*.h.2.*"]}, [1, 3]),
    ],
    ids=["all", "layers", "include", "exclude", "layers-and-exclude"],
)
def test_choice_of_layers(choice: Any, expected: list[int], pretrained: Any, batch: Any) -> None:
    model = pretrained("gpt2-zinc", "AutoModelForCausalLM")
    before, inputs = fingerprint(model), batch("gpt2-zinc")
    softmax = output(model, inputs)
    hp.patch_model(model, "poly3", **choice)
    assert layers_of(model) == expected
    statuses = [row[-1] for row in hp.describe(model).rows]
    assert [index for index, status in enumerate(statuses) if status == "patched"] == expected
    assert not torch.equal(output(model, inputs), softmax)
    hp.unpatch_model(model)
    assert fingerprint(model) == before


def test_choices_in_the_config_and_in_the_call_are_the_same(pretrained: Any) -> None:
    model = hp.patch_model(pretrained("gpt2-zinc"), hp.PolyAttentionConfig("poly3", layers=[2]))
    assert layers_of(model) == [2]
    assert hp.patch_model(model, "poly3", layers=[2]) is model


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"layers": [2, 4]}, r"no attention in layers \[4\]; it has layers \[0, 1, 2, 3\]"),
        ({"layers": []}, "no module that can be patched: .*layer not asked for"),
        ({"include": ["nowhere"]}, "no module that can be patched: .*excluded"),
    ],
    ids=["out-of-range", "no-layer", "no-path"],
)
def test_a_choice_of_nothing_raises(choice: Any, message: str, pretrained: Any) -> None:
    model = pretrained("gpt2-zinc")
    before = fingerprint(model)
    with pytest.raises(hp.PatchError, match=message):
        hp.patch_model(model, "poly3", **choice)
    assert fingerprint(model) == before


def decoder_with_cross_attention(family: str) -> Any:
    sizes: dict[str, Any] = {"add_cross_attention": True, "initializer_range": 0.4, "vocab_size": 64}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **sizes)).eval()
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, is_decoder=True, **sizes
    )
    return BertLMHeadModel(config).eval()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_cross_attention_stays_softmax_unless_asked_for(family: str) -> None:
    torch.manual_seed(0)
    model, encoded = decoder_with_cross_attention(family), torch.randn(2, 7, 32)
    padding = torch.ones(2, 7, dtype=torch.long)
    padding[1, 4:] = 0
    inputs = {
        "input_ids": torch.randint(0, 64, (2, 5)),
        "encoder_hidden_states": encoded,
        "encoder_attention_mask": padding,
    }
    softmax = output(model, inputs)
    selfish = output(hp.patch_model(model, "poly3"), inputs)
    assert len(patched_layers(model)) == 2
    hp.unpatch_model(model)
    assert torch.equal(output(model, inputs), softmax)

    both = output(hp.patch_model(model, "poly3", cross_attention=True), inputs)
    assert len(patched_layers(model)) == 4
    assert not torch.equal(both, selfish)
    # What encoder_attention_mask hides has no influence, what it shows has.
    other = encoded.clone()
    other[1, 4:] += 1.0
    assert torch.equal(output(model, {**inputs, "encoder_hidden_states": other}), both)
    other[1, 3] += 1.0
    assert not torch.equal(output(model, {**inputs, "encoder_hidden_states": other}), both)


def test_dry_run_prints_the_plan_and_changes_nothing(pretrained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = pretrained("gpt2-zinc", "AutoModelForCausalLM")
    before = fingerprint(model)
    assert hp.patch_model(model, "poly3", layers=[0], dry_run=True) is model
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["module", "class", "layer", "heads", "head", "dim", "spec", "status"]
    assert lines[2].split()[:2] == ["transformer.h.0.attn", "GPT2Attention"]
    assert lines[2].endswith("can be patched")
    assert lines[3].endswith("layer not asked for")
    assert fingerprint(model) == before


def test_describe_lists_every_attention_module(pretrained: Any) -> None:
    model = pretrained("llama", "AutoModelForCausalLM")
    assert {row[-1] for row in hp.describe(model).rows} == {"can be patched"}
    hp.patch_model(model, "poly3^16-l1", layers=[0])
    table = hp.describe(model)
    assert table.rows[0] == ("model.layers.0.self_attn", "LlamaAttention", 0, 8, 8, "poly3^16-l1", "patched")
    assert table.rows[1][-2:] == ("softmax", "layer not asked for")
    with hp.softmax_attention(model):
        assert hp.describe(model).rows[0][-1] == "patched, but running sdpa"
    lines = str(table).splitlines()
    assert len(lines) == 2 + 5 + 1
    assert lines[1].startswith("---")
    assert lines[-1].startswith("uncalibrated: 1 of 5 modules.")
