"""What an ordinary user does is safe: patch, calibrate, and train all parameters as if they were any others."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from quality import Case, molecules, stories
from transformers import PreTrainedModel

import hf_polyattn as hp
from hf_polyattn.patching.patched import patched_layers
from hf_polyattn.patching.relative import RelativePolynomial

STEPS = 20
WORSE = 1.002  # the NLL may be, times that with frozen polynomials
STEEPER = 10.0  # the polynomials' gradient may be, times the projections'
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "attn.c_proj")
LLAMA = ["poly3", "poly3-mean", "poly3-none", "poly4-l1", "poly6-l1", "poly3^16-l1", "poly3~1", "poly4~1-l1"]
GPT2 = ["poly3~1", "poly6-l1"]


@pytest.fixture(scope="module")
def case(shared: Any) -> Any:
    """`case(name)`: a checkpoint with batches to train on and a measure on held-out data, small enough for a test."""

    @cache
    def load(name: str) -> Case:
        if name == "llama":
            found = stories(shared("checkpoints/llama-stories260K"), start=1, count=16, size=2, held_out=8)
        else:
            found = molecules(shared("checkpoints/gpt2-zinc-0.5m"), held_out=128)
        rows = 2 if name == "llama" else 16
        parts = [{key: value.split(rows) for key, value in batch.items()} for batch in found.batches]
        batches = [dict(zip(part, row, strict=True)) for part in parts for row in zip(*part.values(), strict=True)]
        return Case(found.model, batches, found.measure)

    return load


@pytest.fixture(scope="module")
def calibrated(case: Any) -> Any:
    """`calibrated(name, spec)`: a copy of a checkpoint, patched and calibrated."""

    @cache
    def calibrate(name: str, spec: str) -> PreTrainedModel:
        model = hp.patch_model(copy.deepcopy(case(name).model), spec)
        hp.calibrate(model, case(name).batches[:6], progress=False)
        return model

    return lambda name, spec: copy.deepcopy(calibrate(name, spec))


def norm(gradients: list[torch.Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def train(model: PreTrainedModel, batches: list[Any], lr: float) -> float:
    """Trains all parameters alike; returns the most that the polynomials' gradient was, times the projections'."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)  # Trainer's
    steeper = 0.0
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        polynomial = [parameter.grad for name, parameter in trained.items() if ".polyattn." in name]
        projections = [
            parameter.grad for name, parameter in trained.items() if any(part in name for part in PROJECTIONS)
        ]
        if polynomial:
            steeper = max(steeper, norm(polynomial) / norm(projections))
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return steeper


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    for _, layer in patched_layers(model):
        layer.requires_grad_(False)
    return model


@torch.no_grad()
def train_coefficients(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the coefficients of powers of t train as they are, as before version 0.1.0 was out."""
    for module in model.modules():
        if isinstance(module, RelativePolynomial):
            module.directions.copy_(torch.eye(module.directions.shape[-1]))
    return model


def compared(case: Case, model: PreTrainedModel, lr: float) -> tuple[float, float]:
    """Returns the NLL after training, times that with frozen polynomials, and how steep the polynomials were."""
    frozen = freeze(copy.deepcopy(model))
    train(frozen, case.batches, lr)
    steeper = train(model, case.batches, lr)
    return case.measure(model)["nll"] / case.measure(frozen)["nll"], steeper


@pytest.mark.parametrize(("name", "spec"), [("llama", spec) for spec in LLAMA] + [("gpt2-zinc", s) for s in GPT2])
@pytest.mark.parametrize("lr", [2e-5, 1e-4])
def test_a_plain_training_is_no_worse_than_with_frozen_polynomials(
    lr: float, name: str, spec: str, case: Any, calibrated: Any
) -> None:
    worse, steeper = compared(case(name), calibrated(name, spec), lr)
    assert worse < WORSE
    assert 0.0 < steeper < STEEPER


@pytest.mark.parametrize(("lr", "spec"), [(1e-4, "poly4-l1"), (2e-5, "poly6-l1")])
def test_training_the_coefficients_themselves_would_be_worse(lr: float, spec: str, case: Any, calibrated: Any) -> None:
    worse, steeper = compared(case("llama"), train_coefficients(calibrated("llama", spec)), lr)
    assert worse > WORSE
    assert steeper > STEEPER
