"""What an ordinary user does is safe: patch, calibrate, and train all parameters as if they were any others."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import plain_training
import pytest
from plain_training import CASES, RATES, calibrated, frozen, in_powers, train
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_polyattn.patching.patched import patched_layers

WORSE = 1.002  # the NLL may be, over that with frozen polynomials
STEEP = 10.0  # the polynomials' gradient may be, over the projections'


@pytest.fixture(scope="module")
def case(shared: Any) -> Any:
    shared("checkpoints")
    return cache(lambda name: CASES[name]())


@pytest.fixture(scope="module")
def start(case: Any) -> Any:
    """`start(name, spec)`: a checkpoint, patched and calibrated; not to be changed."""
    return cache(lambda name, spec: calibrated(case(name), spec))


@pytest.fixture(scope="module")
def with_frozen(case: Any, start: Any) -> Any:
    """`with_frozen(name, spec, lr)`: the NLL after a training in which the polynomials are frozen."""

    def nll(name: str, spec: str, lr: float) -> float:
        model = frozen(start(name, spec))
        train(model, case(name).batches, lr)
        return float(case(name).measure(model)["nll"])

    return cache(nll)


# What is not safe in powers of t, and one of each kind of the others; benchmarks/plain_training.json has the rest.
PLAIN = [
    *[("llama", "poly6-l1", lr) for lr in RATES],
    *[("llama", spec, 1e-4) for spec in ("poly3-none", "poly3~1", "poly4~1-l1")],
    ("gpt2-zinc", "poly3^16-l1", 1e-4),
]


@pytest.mark.parametrize(("name", "spec", "lr"), PLAIN)
def test_a_plain_training_is_no_worse_than_with_frozen_polynomials(
    name: str, spec: str, lr: float, case: Any, start: Any, with_frozen: Any
) -> None:
    model = copy.deepcopy(start(name, spec))
    steepest = train(model, case(name).batches, lr)
    assert case(name).measure(model)["nll"] < WORSE * with_frozen(name, spec, lr)
    assert 0.0 < steepest < STEEP


@pytest.mark.parametrize(("spec", "lr"), [("poly4~1-l1", 1e-4), ("poly6-l1", 2e-5)])
def test_steps_in_the_coefficients_themselves_would_be_worse(
    spec: str, lr: float, case: Any, start: Any, with_frozen: Any
) -> None:
    model = in_powers(start("llama", spec))
    steepest = train(model, case("llama").batches, lr)
    assert case("llama").measure(model)["nll"] > WORSE * with_frozen("llama", spec, lr)
    assert steepest > STEEP


def test_trainer_with_its_own_arguments_is_safe(case: Any, start: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for batch in case("llama").batches for row in batch["input_ids"]]

    def trained(model: PreTrainedModel) -> float:
        arguments = TrainingArguments(
            tmp_path, max_steps=10, per_device_train_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=0
        )
        assert (arguments.max_grad_norm, arguments.learning_rate) == (1.0, 5e-5)
        Trainer(model, arguments, train_dataset=rows).train()
        return float(case("llama").measure(model.eval())["nll"])

    model = copy.deepcopy(start("llama", "poly6-l1"))
    assert trained(model) < WORSE * trained(frozen(model))
    assert all(layer.delta.abs().min() > 0.0 for _, layer in patched_layers(model))


def test_the_json_says_so_too() -> None:
    checkpoints = json.loads(plain_training.RESULTS.read_text())["checkpoints"]
    assert {"poly4-l1", "poly6-l1"} <= checkpoints["llama"].keys()
    for name, table in checkpoints.items():
        for spec, rates in table.items():
            for lr in RATES:
                arms = rates[f"{lr:g}"]
                assert arms["trained"]["nll"] < WORSE * arms["frozen"]["nll"], (name, spec, lr)
                assert arms["trained"]["gradient"] < STEEP, (name, spec, lr)
    for spec in ("poly4-l1", "poly6-l1"):
        arms = checkpoints["llama"][spec][f"{RATES[0]:g}"]
        assert arms["in powers of t"]["nll"] > WORSE * arms["frozen"]["nll"]
        assert arms["in powers of t"]["gradient"] > STEEP
