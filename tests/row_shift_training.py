"""What training does to a row shift: alignment with either residual as penalty, and distillation with it fixed or not.

    python tests/row_shift_training.py llama --write      # ten minutes → benchmarks/row_shift_training.json
    python tests/row_shift_training.py gpt2-zinc align-moments

All arms see the same batches in the same order (a seed is an order), are calibrated on the data of `tests/quality.py`
and measured, division-free, by the mean negative log-likelihood of a token of its held-out data.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import quality
from adaptation_study import ROWS, Batch, run
from transformers import PreTrainedModel

import hf_polyattn as hp
from hf_polyattn.adaptation.distillation import LEARNING_RATES
from hf_polyattn.patching.patched import patched_layers

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "row_shift_training.json"
SPECS = ("poly3",)
STEPS, SEEDS = 40, 2


def align(
    model: PreTrainedModel, batches: list[Batch], calibration: list[Batch], spec: str, lr: float, *, row_shift: Any
) -> None:
    """Lowers what a row shift of that kind leaves, then calibrates with the one that the data ask for."""
    hp.patch_model(model, hp.PolyAttentionConfig(spec, row_shift=row_shift))
    hp.align(model, batches, steps=len(batches), lr=lr, progress=False)
    hp.calibrate(model, calibration, progress=False)


def distill(
    model: PreTrainedModel, batches: list[Batch], calibration: list[Batch], spec: str, lr: float, *, fixed: bool
) -> None:
    """Calibrates, then trains the model with its polynomials; a fixed row shift stays as calibration made it."""
    hp.calibrate(hp.patch_model(model, spec), calibration, progress=False)
    for _, child in patched_layers(model) if fixed else ():
        for name, parameter in child.named_parameters():
            if name.startswith("moments.") or name.endswith(("center", "key_shift", "steps")):
                parameter.requires_grad_(False)
    hp.distill(model, batches, steps=len(batches), lr=lr, coefficient_lr=LEARNING_RATES["fixed"][1], progress=False)


def calibrate(model: PreTrainedModel, batches: list[Batch], calibration: list[Batch], spec: str, lr: float) -> None:
    """The control: no training."""
    hp.calibrate(hp.patch_model(model, spec), calibration, progress=False)


ARMS: dict[str, Callable[[PreTrainedModel, list[Batch], list[Batch], str, float], None]] = {
    "calibrated": calibrate,
    "align-linear": partial(align, row_shift="linear"),
    "align-moments": partial(align, row_shift="moments"),
    "distill": partial(distill, fixed=False),
    "distill-fixed-shift": partial(distill, fixed=True),
}


def study(name: str, arms: list[str], steps: int = STEPS, seeds: int = SEEDS) -> Iterator[dict[str, Any]]:
    """Yields the table of a checkpoint after each arm: spec → arm → a figure for each seed."""
    case, (folder, load, rows, lr) = quality.CASES[name](), ROWS[name]
    batches = load(quality.SHARED / "checkpoints" / folder, count=rows * steps).batches
    table: dict[str, Any] = {"softmax": case.measure(case.model)}
    for spec in SPECS:
        for arm in arms:
            found = table.setdefault(spec, {}).setdefault(arm, [])
            for seed in range(1 if arm == "calibrated" else seeds):
                model = copy.deepcopy(case.model)
                ARMS[arm](model, random.Random(seed).sample(batches, steps), case.batches, spec, lr)
                found.append(case.measure(model)["nll"])
            yield table


if __name__ == "__main__":
    run(__doc__, ARMS, RESULTS, study, STEPS, SEEDS)
