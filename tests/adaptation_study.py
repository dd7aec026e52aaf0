"""Ways to adapt that the library does not have, beside `calibrate` and training, under one small budget.

    python tests/adaptation_study.py --write      # all of it, about half an hour → benchmarks/adaptation.json
    python tests/adaptation_study.py gpt2-zinc direct chebyshev

An arm says how the polynomials are computed and how the model is trained from there. All arms see the same batches in
the same order (a seed is an order) and are measured, as polynomial models, by the mean negative log-likelihood of a
token of held-out data. The control is the softmax model after the same training.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import quality
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_polyattn as hp
from hf_polyattn.adaptation.calibration import choice_for, fit_layers, write_fits
from hf_polyattn.adaptation.capture import Observation, Replay, model_inputs, observing
from hf_polyattn.adaptation.distillation import LEARNING_RATES, divergence
from hf_polyattn.adaptation.training import TrainingOptions, TrainingState, param_groups, train
from hf_polyattn.patching.attention import softmax_forward
from hf_polyattn.patching.core import PolyAttention
from hf_polyattn.patching.patched import patched_layers
from hf_polyattn.patching.range_mask import RangeMask

Batch = dict[str, Tensor]
Groups = list[dict[str, Any]]  # of the optimizer, beside those of the model

ROW_SHIFT = "linear"  # that the figures are of: moments leave little to gain
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "adaptation.json"
SPECS = ("poly3", "poly4-l1")  # the second, of which calibration leaves little to train, is only computed
STEPS, SEEDS = 60, 2

# Folder, data, rows a step and learning rate, as in recipes/configs/measurements.yaml.
ROWS: dict[str, tuple[str, Callable[..., quality.Case], int, float]] = {
    "gpt2-zinc": ("gpt2-zinc-0.5m", quality.molecules, 64, 3e-4),
    "llama": ("llama-stories260K", partial(quality.stories, start=1, size=12), 12, 1e-3),
}


def calibrated(model: PreTrainedModel, batches: list[Batch]) -> None:
    """The library's: all layers on softmax's inputs."""
    hp.calibrate(model, batches, row_shift=ROW_SHIFT, progress=False)


@torch.no_grad()
def refitted(model: PreTrainedModel, batches: list[Batch]) -> None:
    """Calibrates all layers, then fits all output projections, both on softmax's inputs."""
    calibrated(model, batches)
    inputs = Replay(model, batches, progress=False)
    for path, _ in patched_layers(model):
        fit_projection(model, path, inputs)


@torch.no_grad()
def sequential(model: PreTrainedModel, batches: list[Batch], *, refit: bool = False) -> None:
    """Calibrates front to back, each layer on what the polynomials before it make of the data; also its projection."""
    for path, child in patched_layers(model):
        inputs = own_inputs(model, path, child, batches)
        choice = choice_for([child.config.spec], ROW_SHIFT, None)
        write_fits(model, fit_layers(model, inputs, {path: child.config.spec}, choice))
        if refit:
            fit_projection(model, path, inputs)


@torch.no_grad()
def own_inputs(model: PreTrainedModel, path: str, child: PolyAttention, batches: list[Batch]) -> Replay:
    """Returns what one layer sees, and softmax makes of it, while every other layer is polynomial."""
    inputs = Replay(model, batches, progress=False)
    inputs.kept = kept = []
    for batch in batches:
        with observing(model, path, child, batch, lambda *seen: kept.append(seen)):
            model(**model_inputs(model, batch), use_cache=False)
    return inputs


def fit_projection(model: PreTrainedModel, path: str, inputs: Replay, *, ridge: float = 1e-3) -> None:
    """Changes an output projection so that it makes of the polynomial's outputs what it made of softmax's.

    Least squares over the positions that are not padding; `ridge`, on the change, is relative to the mean square.
    """
    polynomial, softmax = [], []

    def observer(where: str, child: PolyAttention, seen: Observation) -> None:
        if where == path:
            output = child(seen.query, seen.key, seen.value, **seen.pattern)
            real = torch.ones(output.shape[:2], dtype=torch.bool) if seen.real is None else seen.real
            polynomial.append(output[real].flatten(1).double())
            softmax.append(seen.output[real].flatten(1).double())

    inputs.run(observer, "outputs")
    x, y = torch.cat(polynomial), torch.cat(softmax)
    projection: Any = getattr(model.get_submodule(path), "c_proj", None) or model.get_submodule(path).o_proj
    weight = projection.weight.T if isinstance(projection, nn.Linear) else projection.weight  # (in, out)
    missing = (y - x) @ weight.double()
    x = torch.cat([x, torch.full_like(x[:, :1], projection.bias is not None)], -1)
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    change = torch.linalg.solve(gram, x.T @ missing)
    weight += change[:-1]
    if projection.bias is not None:
        projection.bias += change[-1]


def in_powers(model: PreTrainedModel, steps: int) -> AbstractContextManager[Groups]:
    """Trains the coefficients of powers of t, in steps that are not relative to anything."""
    return in_basis(model, np.eye)


def in_chebyshev(model: PreTrainedModel, steps: int) -> AbstractContextManager[Groups]:
    """Trains coefficients of Chebyshev polynomials. Calibration is linear in coefficients: the same in any basis."""
    return in_basis(model, chebyshev_polynomials)


@torch.no_grad()
def in_basis(model: PreTrainedModel, basis: Callable[[int], np.ndarray]) -> AbstractContextManager[Groups]:
    """Makes what trains the coefficients of a basis, of which there is a polynomial a row: (P + 1, P + 1)."""
    for _, child in patched_layers(model):
        child.directions.copy_(torch.from_numpy(basis(child.config.spec.degree + 1)).expand_as(child.directions))
    return nullcontext([])


def chebyshev_polynomials(count: int) -> np.ndarray:
    """Returns the coefficients of powers of t of the first Chebyshev polynomials, (count, count)."""
    rows = [np.polynomial.chebyshev.cheb2poly(row) for row in np.eye(count)]
    return np.stack([np.pad(row, (0, count - len(row))) for row in rows])


@contextmanager
def blended(model: PreTrainedModel, steps: int, *, part: float = 0.5, rate: float = 0.1) -> Iterator[Groups]:
    """Trains with λ_h · polynomial + (1 − λ_h) · softmax for the outputs; after a part of the steps λ is 1.

    λ_h = floor + (1 − floor) · sigmoid(logit_h): learned, above a floor that rises from 0 to 1.
    """
    floor, floors = 0.0, iter((np.arange(steps) / (part * steps)).clip(max=1.0).tolist())

    def raise_floor(*_: Any) -> None:
        nonlocal floor
        floor = next(floors)

    def blend(module: nn.Module, logit: Tensor, _: nn.Module, qkv: Any, options: dict[str, Any], out: Tensor) -> Tensor:
        mask, ranges, (query, key, value) = options["mask"], options["ranges"], qkv
        if ranges is not None:
            mask = RangeMask(ranges.expand(len(query), -1, -1), query.shape[2], key.shape[2])
        softmax, _ = softmax_forward(module, query, key, value, mask, scaling=options["scaling"])
        return torch.lerp(softmax, out, (floor + (1.0 - floor) * logit.sigmoid())[:, None])

    logits, handles = [], [model.register_forward_pre_hook(raise_floor)]
    for path, child in patched_layers(model):
        logits.append(nn.Parameter(torch.full((child.heads,), -3.0)))
        hook = partial(blend, model.get_submodule(path), logits[-1])
        handles.append(child.register_forward_hook(hook, with_kwargs=True))
    yield [{"params": logits, "lr": rate, "weight_decay": 0.0}]
    for handle in handles:
        handle.remove()


Way = Callable[[PreTrainedModel, int], AbstractContextManager[Groups]]
ARMS: dict[str, tuple[Callable[[PreTrainedModel, list[Batch]], None], Way]] = {
    "direct": (calibrated, in_powers),
    "sequential": (sequential, in_powers),
    "refit": (refitted, in_powers),
    "sequential-refit": (partial(sequential, refit=True), in_powers),
    "chebyshev": (calibrated, in_chebyshev),
    "blend": (calibrated, blended),
    "short-blend": (calibrated, partial(blended, part=0.25)),
}


def adapt(model: PreTrainedModel, teacher: PreTrainedModel, batches: list[Batch], way: Way, lr: float) -> None:
    """Trains a model, in place, on its task and its teacher's outputs as the recipes do; one step a batch."""

    def loss_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        with torch.no_grad():
            target = teacher(**inputs, output_hidden_states=True)
        output = model(**inputs, labels=labels, output_hidden_states=True)
        return output.loss + divergence(output, target, inputs)

    budget: dict[str, Any] = {"steps": len(batches), "warmup": 0.05, "max_grad_norm": 1.0, "until": 0.0}
    options = TrainingOptions(**budget, checkpoint_every=1, accelerator=None, progress=False)
    with way(model, len(batches)) as groups:
        groups += param_groups(model, lr, coefficient_lr=LEARNING_RATES["fixed"][1])
        train(model, batches, loss_of, groups, options, state=TrainingState(None, {}), title="train")


def study(name: str, arms: list[str], steps: int = STEPS, seeds: int = SEEDS) -> Iterator[dict[str, Any]]:
    """Yields the figures of a checkpoint after each arm."""
    case, (folder, load, rows, lr) = quality.CASES[name](), ROWS[name]
    batches = load(quality.SHARED / "checkpoints" / folder, count=rows * steps).batches

    def trained(start: PreTrainedModel, way: Way) -> Iterator[float]:
        for seed in range(seeds):
            model = copy.deepcopy(start)
            adapt(model, case.model, random.Random(seed).sample(batches, steps), way, lr)
            yield case.measure(model)["nll"]

    table: dict[str, Any] = {"softmax": {**case.measure(case.model), "trained": [*trained(case.model, in_powers)]}}
    for spec, arm in itertools.product(SPECS, arms):
        start, way = ARMS[arm]
        if spec == SPECS[0] or way is in_powers:
            model = hp.patch_model(copy.deepcopy(case.model), spec)
            start(model, case.batches)
            after = {"trained": [*trained(model, way)]} if spec == SPECS[0] else {}
            table.setdefault(spec, {})[arm] = {**case.measure(model), **after}
            yield table


def run(
    description: str | None,
    arms: Iterable[str],
    results: Path,
    study: Callable[[str, list[str]], Iterator[dict[str, Any]]],
    steps: int,
    seeds: int,
) -> None:
    """Runs a study as the command line asks: prints its table after each arm and, with --write, keeps it in a JSON."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", choices=ROWS, help="only this one")
    parser.add_argument("arms", nargs="*", default=[*arms], help="only these")
    parser.add_argument("--write", action="store_true", help=f"write {results.name}")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    about = {
        "device": {"type": "cpu", "machine": platform.machine(), "threads": torch.get_num_threads()},
        "budget": {"steps": steps, "seeds": seeds, "learning_rate": {name: row[-1] for name, row in ROWS.items()}},
    }
    for name in [arguments.checkpoint] if arguments.checkpoint else ROWS:
        for table in study(name, arguments.arms):
            print(name, table, flush=True)
            if arguments.write:
                quality.write(results, f"python tests/{Path(sys.argv[0]).name} --write", name, table, **about)


if __name__ == "__main__":
    run(__doc__, ARMS, RESULTS, study, STEPS, SEEDS)
