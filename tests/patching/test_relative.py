"""Polynomials train by a change that is small beside what calibration made of them, and older checkpoints have none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from in_double import output
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_polyattn as hp
from hf_polyattn.adaptation.fitting.solves import exponential_fit
from hf_polyattn.errors import CheckpointError
from hf_polyattn.patching.core import PolyAttention
from hf_polyattn.patching.patched import patched_layers
from hf_polyattn.patching.relative import CHANGES, bernstein_polynomials, relative_directions

WIDTHS = (4.0, 10.0, 16.0)


def values(coefficients: Tensor, t: Tensor) -> Tensor:
    return (t[:, None] ** torch.arange(coefficients.shape[-1])) @ coefficients.double().T


@pytest.mark.parametrize("degree", range(1, 9))
def test_bernstein_polynomials_are_those_of_the_formula_and_sum_to_one(degree: int) -> None:
    t = torch.linspace(-1.0, 1.0, 33, dtype=torch.float64)
    u = (t + 1.0) / 2.0
    choose = torch.tensor([torch.exp(torch.lgamma(torch.tensor(degree + 1.0).double())
                                     - torch.lgamma(torch.tensor(k + 1.0).double())
                                     - torch.lgamma(torch.tensor(degree - k + 1.0).double()))
                           for k in range(degree + 1)], dtype=torch.float64)  # fmt: skip
    expected = torch.stack([choose[k] * u**k * (1.0 - u) ** (degree - k) for k in range(degree + 1)], -1)
    found = values(bernstein_polynomials(degree), t)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(t), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("spec", ["poly3-l1", "poly4-l1", "poly6-l1", "poly3^16-l1", "poly3", "poly8-mean"])
def test_a_step_changes_no_weight_by_more_than_its_size(spec: str) -> None:
    """p(t)^s with every δ = ±ε, against p(t)^s; the control takes steps in the coefficients, of the same norm."""
    polynomial, epsilon = hp.Polynomial.parse(spec), 1e-3
    width = [width * polynomial.power**0.5 for width in WIDTHS]
    coefficients = torch.stack([exponential_fit(polynomial.degree, w / polynomial.power) for w in width])
    directions = relative_directions(coefficients, polynomial)
    t = torch.linspace(-1.0, 1.0, 1001, dtype=torch.float64)
    weights = values(coefficients, t) ** polynomial.power
    floor = (1e-6 if polynomial.normalizer == "l1" else 1e-2) * values(coefficients, t).abs().amax(0)
    allowed = 1.1 * epsilon * torch.maximum(weights.abs(), floor**polynomial.power)
    generator = torch.Generator().manual_seed(0)
    worst = {"relative": torch.zeros(3).double(), "coefficients": torch.zeros(3).double()}
    for _ in range(64):
        signs = torch.randint(0, 2, coefficients.shape, generator=generator).double() * 2.0 - 1.0
        step = epsilon * torch.einsum("hl,hlk->hk", signs, directions)
        same = epsilon * directions.norm(dim=(1, 2))[:, None] * signs / signs.shape[1] ** 0.5
        for name, change in (("relative", step), ("coefficients", same)):
            moved = (values(coefficients + change, t) ** polynomial.power - weights).abs() / allowed
            worst[name] = torch.maximum(worst[name], moved.amax(0))
    assert (worst["relative"] <= 1.0).all()
    assert (worst["relative"] > 0.1).all()  # nor is it much less
    assert (worst["coefficients"] > worst["relative"]).all()


@pytest.fixture(scope="module")
def calibrated_once(pretrained: Any, batch: Any) -> Any:
    model = hp.patch_model(pretrained("gpt2-zinc", "AutoModelForCausalLM"), "poly4~1-mean")
    hp.calibrate(model, [batch("gpt2-zinc", 4, 64)], row_shift="moments", squares=2, progress=False)
    return model


@pytest.fixture
def calibrated(calibrated_once: Any) -> Any:
    """A calibrated GPT-2 with all that can be trained."""
    return copy.deepcopy(calibrated_once)


@pytest.fixture
def trained(calibrated: Any, batch: Any) -> Any:
    """One whose polynomials have trained."""
    train(calibrated, batch("gpt2-zinc"))
    return calibrated


def train(model: Any, inputs: dict[str, Tensor], steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_trained_polynomial_is_saved_with_its_change_and_trains_on(trained: Any, batch: Any, tmp_path: Path) -> None:
    inputs = batch("gpt2-zinc")
    trained.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = output(trained, **inputs)
    assert torch.equal(output(again, **inputs), expected)
    for (_, layer), (_, other) in zip(patched_layers(trained), patched_layers(again), strict=True):
        for part in (layer, layer.refinements[0]):
            assert part.delta.abs().min() > 0.0
        assert torch.equal(layer.changed_coefficients(), other.changed_coefficients())
        assert not torch.equal(layer.changed_coefficients(), layer.coefficients)
    train(trained, inputs)
    train(again, inputs)
    assert torch.equal(output(again, **inputs), output(trained, **inputs))
    assert not torch.equal(output(again, **inputs), expected)


def test_calibration_and_another_spec_start_from_no_change(trained: Any, batch: Any) -> None:
    hp.calibrate(trained, [batch("gpt2-zinc", 4, 64)], progress=False)
    for _, layer in patched_layers(trained):
        for part in (layer, layer.refinements[0]):
            assert not part.delta.any()
            assert torch.equal(part.changed_coefficients(), part.coefficients)
    for _, layer in patched_layers(trained):
        with torch.no_grad():
            layer.delta.add_(1.0)
        layer.change_spec(hp.Polynomial.parse("poly3"))
        assert layer.changed_coefficients().tolist() == [[0.0, 0.0, 0.0, 1.0]] * layer.heads


# ---------------------------------------------------------------- checkpoints of earlier versions, without changes


def older(folder: Path, keep: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Takes the changes out of a saved model, but those of a name; returns the tensors that are left."""
    file = folder / "model.safetensors"
    dropped = tuple(f".{name}" for name in CHANGES if name not in keep)
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(dropped)}
    save_file(tensors, file, metadata={"format": "pt"})
    return tensors


def test_a_checkpoint_without_changes_loads_to_the_bit_and_trains_alike(
    calibrated: Any, batch: Any, tmp_path: Path
) -> None:
    calibrated.save_pretrained(tmp_path)
    tensors = older(tmp_path)
    loaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    state = hp.patch_model(AutoModelForCausalLM.from_pretrained(tmp_path), "poly4~1-mean")
    for _, layer in patched_layers(state):
        with torch.no_grad():
            layer.delta.fill_(7.0)
    state.load_state_dict({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
    inputs, expected = batch("gpt2-zinc"), output(calibrated, **batch("gpt2-zinc"))
    for model in (loaded, state):
        assert torch.equal(output(model, **inputs), expected)
        for (_, layer), (_, other) in zip(patched_layers(model), patched_layers(calibrated), strict=True):
            assert {n: p.requires_grad for n, p in layer.named_parameters()} == {
                n: p.requires_grad for n, p in other.named_parameters()
            }
            for name, tensor in layer.state_dict().items():
                assert torch.equal(tensor, other.state_dict()[name]), name
    train(loaded, inputs)
    train(calibrated, inputs)
    assert torch.equal(output(loaded, **inputs), output(calibrated, **inputs))


@pytest.mark.parametrize("kept", CHANGES)
def test_half_of_a_change_is_damage(kept: str, calibrated: Any, tmp_path: Path) -> None:
    calibrated.save_pretrained(tmp_path)
    older(tmp_path, keep=(kept,))
    with pytest.raises(CheckpointError, match=r"\['(delta|directions)', .* are missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_adapter_without_changes_brings_its_polynomials(
    calibrated: Any, pretrained: Any, batch: Any, tmp_path: Path
) -> None:
    adapted = get_peft_model(calibrated, LoraConfig(target_modules=["c_attn"], modules_to_save=["polyattn"]))
    expected = output(adapted.eval(), **batch("gpt2-zinc"))
    adapted.save_pretrained(tmp_path)
    for name in ("polyattn.safetensors", "adapter_model.safetensors"):
        file = tmp_path / name
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata()
        tensors = {key: tensor for key, tensor in load_file(file).items() if not key.endswith(CHANGES)}
        assert len(tensors) < len(load_file(file))
        save_file(tensors, file, metadata=metadata)
    softmax = pretrained("gpt2-zinc", "AutoModelForCausalLM")
    loaded = PeftModel.from_pretrained(softmax, tmp_path).eval()
    assert torch.equal(output(loaded, **batch("gpt2-zinc")), expected)
    assert all(type(layer) is PolyAttention for _, layer in patched_layers(loaded))
