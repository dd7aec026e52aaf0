"""Patching through the wrappers that models come in, and what a patched module is."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
)
from with_heads import output

import hf_polyattn as hp
from hf_polyattn.patching.attention import polyattn_forward
from hf_polyattn.patching.core import PolyAttention
from hf_polyattn.patching.patched import patched_layers

# ---------------------------------------------------------------- wrappers


def lora(model: Any, **kwargs: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **kwargs))


@pytest.mark.parametrize("order", ["patch-first", "peft-first"])
def test_patching_works_through_peft(order: str, pretrained: Any, batch: Any) -> None:
    inputs = batch("llama")
    plain = pretrained("llama", "AutoModelForCausalLM")
    softmax = output(plain, inputs)
    expected = output(hp.patch_model(plain, "poly3"), inputs)

    model = pretrained("llama", "AutoModelForCausalLM")
    wrapped = lora(hp.patch_model(model, "poly3")) if order == "patch-first" else hp.patch_model(lora(model), "poly3")
    assert hp.is_patched(wrapped)
    assert len(hp.describe(wrapped).rows) == 5
    assert torch.equal(output(wrapped, inputs), expected)
    with hp.softmax_attention(wrapped):
        assert torch.equal(output(wrapped, inputs), softmax)
    assert hp.unpatch_model(wrapped) is wrapped
    assert torch.equal(output(wrapped, inputs), softmax)
    assert not torch.equal(expected, softmax)


def train_step(model: Any, inputs: dict[str, Tensor], rate: float) -> None:
    """One step of gradient descent with steps of one length for every tensor."""
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad / (parameter.grad.norm() + 1e-30)
                parameter.grad = None
    model.eval()


def test_peft_trains_saves_and_merges_coefficients(pretrained: Any, polynomial: Any, batch: Any, tmp_path: Any) -> None:
    from peft import PeftModel

    inputs = batch("llama")
    base = polynomial(pretrained("llama", "AutoModelForCausalLM"))
    before = [layer.changed_coefficients() for _, layer in patched_layers(base)]
    model = lora(copy.deepcopy(base), modules_to_save=["polyattn"])
    start = output(model, inputs)
    assert torch.equal(start, output(base, inputs))
    train_step(model, inputs, 0.05)
    trained = output(model, inputs)
    assert not torch.equal(trained, start)
    for (_, layer), old in zip(patched_layers(model), before, strict=True):
        assert not torch.equal(layer.changed_coefficients(), old)

    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(output(reloaded, inputs), trained)

    merged = reloaded.merge_and_unload()
    layers = patched_layers(merged)
    assert [type(merged.get_submodule(path).polyattn) for path, _ in layers] == [PolyAttention] * 5
    for (_, layer), (_, expected) in zip(layers, patched_layers(model), strict=True):
        assert torch.equal(layer.changed_coefficients(), expected.changed_coefficients())
    # Merging adds the LoRA product to the weights: the same numbers in another order of float32 sums.
    torch.testing.assert_close(output(merged, inputs), trained, rtol=1e-3, atol=1e-3)


def test_peft_loads_trained_polynomials_onto_an_uncalibrated_model(pretrained: Any, tmp_path: Any) -> None:
    from peft import PeftModel

    model = hp.patch_model(pretrained("llama", "AutoModelForCausalLM"), "poly3")
    lora(model, modules_to_save=["polyattn"]).save_pretrained(tmp_path)
    patched = hp.patch_model(pretrained("llama", "AutoModelForCausalLM"), "poly3")
    assert hp.is_patched(PeftModel.from_pretrained(patched, tmp_path))


def test_peft_without_modules_to_save_freezes_the_polynomials(pretrained: Any, polynomial: Any, batch: Any) -> None:
    model = lora(polynomial(pretrained("llama", "AutoModelForCausalLM")))
    before = [layer.changed_coefficients() for _, layer in patched_layers(model)]
    start = output(model, batch("llama"))
    train_step(model, batch("llama"), 0.05)
    assert not torch.equal(output(model, batch("llama")), start)
    assert all(
        torch.equal(layer.changed_coefficients(), old)
        for (_, layer), old in zip(patched_layers(model), before, strict=True)
    )


class Replica(nn.Module):
    """Holds a model as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Tensor) -> Any:
        return self.module(**inputs)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [compiled, Replica, lambda model: Replica(compiled(model))],
    ids=["compiled", "replica", "replica-of-compiled"],
)
def test_patching_works_through_wrappers(wrap: Any, pretrained: Any, batch: Any) -> None:
    inputs, model = batch("gpt2-zinc"), pretrained("gpt2-zinc", n_layer=1)
    softmax = output(model, inputs)
    wrapped = wrap(model)
    assert hp.patch_model(wrapped, "poly3") is wrapped
    assert hp.is_patched(wrapped)
    assert hp.is_patched(model)
    polynomial = output(wrapped, inputs)
    assert not torch.equal(polynomial, softmax)
    with hp.softmax_attention(wrapped):
        assert torch.equal(output(wrapped, inputs), softmax)
    assert torch.equal(output(wrapped, inputs), polynomial)
    hp.unpatch_model(wrapped)
    assert torch.equal(output(wrapped, inputs), softmax)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", ["minilm", "gpt2-zinc", "llama", "vit"])
def test_copies_are_equal_and_independent(clone: Any, name: str, pretrained: Any, polynomial: Any, batch: Any) -> None:
    model, inputs = pretrained(name), batch(name)
    softmax = output(model, inputs)
    expected = output(polynomial(model), inputs)
    other = clone(model)
    assert torch.equal(output(other, inputs), expected)
    with torch.no_grad():
        patched_layers(other)[0][1].coefficients.add_(1.0)
    assert not torch.equal(output(other, inputs), expected)
    hp.unpatch_model(other)
    assert torch.equal(output(other, inputs), softmax)
    assert torch.equal(output(model, inputs), expected)


# ---------------------------------------------------------------- polynomials


def test_one_polynomial_a_layer_is_the_same_polynomial_for_its_heads(pretrained: Any, batch: Any) -> None:
    inputs = batch("minilm")
    shared = hp.patch_model(pretrained("minilm"), hp.PolyAttentionConfig("taylor3-l1", granularity="layer"))
    assert {layer.coefficients.shape for _, layer in patched_layers(shared)} == {(1, 4)}
    heads = hp.patch_model(pretrained("minilm"), "taylor3-l1")
    assert {layer.coefficients.shape for _, layer in patched_layers(heads)} == {(12, 4)}
    assert torch.equal(output(shared, inputs), output(heads, inputs))
    with torch.no_grad():
        patched_layers(heads)[0][1].coefficients[3] += 1.0
    assert not torch.equal(output(shared, inputs), output(heads, inputs))


@pytest.mark.parametrize("learnable", [True, False], ids=["learnable", "frozen"])
def test_frozen_polynomials_get_no_gradients(learnable: bool, pretrained: Any, polynomial: Any, batch: Any) -> None:
    config = hp.PolyAttentionConfig("poly3", learnable=learnable, interval=True, clamp=True, key_shift=True)
    model, inputs = polynomial(pretrained("gpt2-zinc", "AutoModelForCausalLM"), config), batch("gpt2-zinc")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.transformer.wte.weight.grad.norm() > 0
    for _, layer in patched_layers(model):
        for name, parameter in layer.named_parameters():
            trains = learnable and name not in ("coefficients", "directions", "radius")
            assert parameter.requires_grad is trains, name
            assert (parameter.grad is not None and bool(parameter.grad.any())) is trains, name


def test_only_what_the_config_uses_is_trainable(pretrained: Any) -> None:
    model = hp.patch_model(pretrained("gpt2-zinc"), "poly3")
    _, layer = patched_layers(model)[0]
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["delta"]


CASTS = {
    "to-bfloat16": lambda model: model.to(torch.bfloat16),
    "to-cpu-float16": lambda model: model.to("cpu", torch.float16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_polynomials_stay_float32_when_the_model_is_cast(
    cast: str, pretrained: Any, polynomial: Any, batch: Any
) -> None:
    model = polynomial(pretrained("llama", "AutoModelForCausalLM"))
    before = {
        key: value for key, value in model.state_dict().items() if "polyattn" in key and value.is_floating_point()
    }
    before = copy.deepcopy(before)
    expected = output(model, batch("llama"))
    model = CASTS[cast](model)
    assert model.dtype in (torch.bfloat16, torch.float16)
    after = {key: value for key, value in model.state_dict().items() if "polyattn" in key}
    assert all(torch.equal(after[key], value) and after[key].dtype == torch.float32 for key, value in before.items())
    assert len(before) == 6 * 5
    actual = output(model, batch("llama"))
    assert actual.dtype == model.dtype
    assert not torch.equal(actual.float(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_polynomials_stay_float32_when_a_checkpoint_is_loaded_in_low_precision(
    dtype: torch.dtype, pretrained: Any, polynomial: Any, tmp_path: Any
) -> None:
    model = polynomial(pretrained("gpt2-zinc", "AutoModelForCausalLM"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert "polyattn" in loaded._keep_in_fp32_modules_strict  # what quantized loading reads
    expected = {key: value for key, value in model.state_dict().items() if "polyattn" in key}
    for key, value in loaded.state_dict().items():
        exact = torch.uint8 if key.endswith("settings") else torch.float32
        assert value.dtype == (exact if "polyattn" in key else dtype), key
        if key in expected:
            assert torch.equal(value, expected[key])
    # Saved from low precision, they are still exact.
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert again.dtype == dtype
    for (_, layer), (_, original) in zip(patched_layers(again), patched_layers(model), strict=True):
        assert torch.equal(layer.coefficients, original.coefficients)
        assert layer.radius.dtype == torch.float32
        assert torch.equal(layer.radius, original.radius)


def test_changed_heads_raise(pretrained: Any) -> None:
    module = hp.patch_model(pretrained("llama"), "poly3").layers[0].self_attn
    key = torch.randn(1, 4, 3, 8)
    with pytest.raises(hp.PatchError, match="patched for 8 query heads and now gets 4"):
        polyattn_forward(module, torch.randn(1, 4, 3, 8), key, key, None)
