"""Annealing: turning the dial step by step, from a polynomial that loses nothing to the cheap one that is wanted.

Every rung of the ladder is computed in closed form from the model before it (whose weights are trained by then) and
distilled until its loss is near that of the rung before, or the budget of steps is spent. Within a rung the layers that
the polynomial fits best go first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..patching.governing import change_specs, reconfigure
from ..patching.patched import patched_layers
from ..patching.running import require_polynomial
from ..spec import CALIBRATED, Polynomial
from ..tables import format_table
from .calibration import calibrate, fit_layers, same_shift, write_fits
from .capture import Replay, take_batches
from .crops import with_crops
from .distillation import distill
from .quality import Quality, similarity
from .teacher import softmax_copy


@dataclass(frozen=True, slots=True)
class Rung:
    """One spec of the ladder.

    Attributes:
        spec: of the layers that had been turned when it ended.
        steps: spent on it.
        loss: mean distillation loss of its last ten steps; None without steps.
        calibrated_quality: before its training.
        quality: after it.
    """

    spec: str
    steps: int
    loss: float | None
    calibrated_quality: float
    quality: float


@dataclass(frozen=True, slots=True)
class AnnealReport:
    """How far the dial was turned.

    Attributes:
        rungs: those that were tried, in order.
        stopped_at: the spec under which the quality fell below the floor, and which was taken back; None if none.
    """

    rungs: tuple[Rung, ...]
    stopped_at: str | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON types."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    def __str__(self) -> str:
        rows = [
            (
                rung.spec,
                rung.steps,
                "" if rung.loss is None else f"{rung.loss:.4g}",
                f"{rung.calibrated_quality:.5f}",
                f"{rung.quality:.5f}",
            )
            for rung in self.rungs
        ]
        table = format_table(("spec", "steps", "loss", "quality calibrated", "quality trained"), rows)
        if self.stopped_at is None:
            return table
        return f"{table}\nstopped: {self.stopped_at} falls below the floor; the model has the rung before it"


def anneal(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    specs: Sequence[str | Polynomial],
    *,
    steps: int,
    tolerance: float = 0.01,
    floor: float | None = None,
    quality: Quality | None = None,
    layers_at_once: int | None = None,
    layer_steps: int = 0,
    lr: float | None = None,
    coefficient_lr: float | None = None,
    calibration_batches: int = 16,
    teacher: nn.Module | None = None,
    accelerator: Any = None,
    progress: bool = True,
) -> AnnealReport:
    """Brings a patched model, in place, down a ladder of specs.

    Args:
        model: patched, with any spec, its weights the pretrained ones.
        batches: dicts of model inputs, more than one pass over them is made; the first ones calibrate.
        specs: the ladder, for example ("poly3^16-l1", "poly6-l1", "poly3-l1", "poly3").
        steps: most updates for each rung.
        tolerance: a rung is done as soon as its loss exceeds that of the rung before by no more.
        floor: least quality; a rung that ends below it is taken back, and the ladder ends there. None goes to its end.
        quality: called with the model; None takes its `similarity` to the teacher on two calibration batches.
        layers_at_once: layers that are turned together, those that fit best first; None turns all at once.
        layer_steps: of `match_layers` before each training.
        lr, coefficient_lr: see `distill`.
        calibration_batches: how many batches calibrate.
        teacher: a softmax model; None takes a copy of `model` with softmax restored.
        accelerator: an `accelerate.Accelerator`.
        progress: show progress bars.

    Returns:
        What each rung cost and kept.

    Raises:
        PatchError: the model is not patched, or is not running its polynomials.
        InputError: an empty ladder, no steps or no batches.
        TrainingError: a loss or gradient is not finite.
    """
    require_polynomial(model)
    ladder = Polynomial.parse_several(specs)
    if not ladder or steps < 1:
        raise InputError(f"anneal needs at least one spec and one step a rung, got {len(ladder)} and {steps}")
    taken = take_batches(batches, calibration_batches)
    shown = with_crops(model, taken, None)
    if teacher is None:
        teacher = softmax_copy(model)
    if quality is None:
        quality = partial(similarity, batches=taken[:2], teacher=teacher)
    paths = [path for path, _ in patched_layers(model)]
    if not all(child.config.interval for _, child in patched_layers(model)):
        calibrate(model, shown, max_batches=None, crop=False, progress=progress)

    rungs: list[Rung] = []
    reached = 0.0
    for spec in ladder:
        before = _Snapshot(model)
        waiting, calibrated = list(paths), 0.0
        losses: list[float] = []
        at_once = layers_at_once or len(paths)
        groups = -(-len(paths) // at_once)
        while waiting:
            passes = Replay(model, shown, progress=progress)
            fits = fit_layers(model, passes, dict.fromkeys(waiting, spec), same_shift(model))
            waiting.sort(key=lambda path: sum(fits[path].report.explained_variance), reverse=True)
            turned, waiting = waiting[:at_once], waiting[at_once:]
            write_fits(model, {path: fits[path] for path in turned})
            calibrated = quality(model)
            report = distill(
                model,
                batches,
                steps=max(1, steps // groups),
                layer_steps=layer_steps,
                lr=lr,
                coefficient_lr=coefficient_lr,
                until=reached + tolerance,
                teacher=teacher,
                accelerator=accelerator,
                progress=progress,
            )
            losses += report.losses
        loss = sum(losses[-10:]) / len(losses[-10:])
        rungs.append(Rung(str(spec), len(losses), loss, calibrated, quality(model)))
        if floor is not None and rungs[-1].quality < floor:
            before.restore()
            return AnnealReport(tuple(rungs), str(spec))
        reached = loss
    return AnnealReport(tuple(rungs), None)


class _Snapshot:
    """The specs and weights of a patched model, to go back to."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.specs = {path: child.config.spec for path, child in patched_layers(model)}
        child = patched_layers(model)[0][1].config
        self.switches = {name: getattr(child, name) for name in CALIBRATED}
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def restore(self) -> None:
        change_specs(self.model, self.specs)
        reconfigure(self.model, **self.switches)
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(self.weights[name])
