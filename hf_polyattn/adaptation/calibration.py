"""Closed-form calibration: per-head polynomials that reproduce softmax, without a gradient step.

Softmax runs over a few batches, every patched layer sees its own queries, keys and values and softmax's
output, and per head three things are computed in passes over the batches:

1. the row shift, by regression of the rows' log partition sums on their queries and, where that pays, on the mean,
   variance and number of their scores, which puts all rows on one interval of scores;
2. the top of that interval: the largest shifted score, or the largest that few rows exceed;
3. for these tops and several widths, the coefficients: linear least squares for the fixed normalizers, the
   ratio fit for l1, scaling and squaring for powers. The interval that reproduces softmax's output best wins.

Source: DESIGN.md, "Calibration in closed form".
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..patching.core import PolyAttention
from ..patching.governing import change_specs, reconfigure
from ..patching.patched import patched_layers, pretrained_model, spec_of
from ..patching.running import require_polynomial
from ..patching.threads import alone
from ..spec import Polynomial
from ..tables import format_table
from .capture import Observation, Replay, take_batches
from .crops import with_crops
from .fitting.layer import LayerFit, LayerReport, Pass
from .fitting.predictor import ROWS_FOR_AN_UNKNOWN, PredictorChoice
from .fitting.row_store import RowStore


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What `calibrate` did; prints as a table and says which layers fit badly.

    Attributes:
        spec: the spec that was calibrated.
        rows: query rows, padding left out, that each layer saw.
        layers: one `LayerReport` per patched attention module.
        unknowns: of the largest regression of a head, on its rows.
        lengths: the fewest and the most keys that a row saw.
        clamp: whether the polynomials are clamped.
    """

    spec: str
    rows: int
    layers: tuple[LayerReport, ...]
    unknowns: int = 1
    lengths: tuple[int, int] | None = None
    clamp: bool = True

    #: A layer whose mean explained variance is lower than this is said to fit badly.
    BAD_FIT = 0.8
    #: Fewer rows for each unknown than this are too few to tell how good a fit is.
    ROWS_FOR_AN_UNKNOWN = ROWS_FOR_AN_UNKNOWN

    @property
    def too_few_rows(self) -> str | None:
        """What to say of a calibration on too few rows; None if there were enough."""
        needed = self.ROWS_FOR_AN_UNKNOWN * self.unknowns
        if self.rows >= needed:
            return None
        return (
            f"{self.rows} rows a layer are too few for {self.unknowns} unknowns a head: the fit is to these rows, and "
            f"may be to no others. Calibrate on at least {needed}."
        )

    @property
    def bad_layers(self) -> tuple[str, ...]:
        """Paths of the layers that fit badly."""
        return tuple(layer.path for layer in self.layers if _mean(layer.explained_variance) < self.BAD_FIT)

    @property
    def worst_head(self) -> str:
        """What to say of the head that fits worst, which a mean over its layer's heads hides."""
        explained, head, path = min(
            (explained, head, layer.path)
            for layer in self.layers
            for head, explained in enumerate(layer.explained_variance)
        )
        return f"the worst head, {head} of {path}, explains {explained:.4f} of its variance under softmax"

    @property
    def needs_clamp(self) -> str | None:
        """What to say of polynomials that cannot do without the clamp they do not have; None if they can."""
        if self.clamp or not self.bad_layers:
            return None
        width = max(max(layer.width) for layer in self.layers if layer.path in self.bad_layers)
        return (
            f"without a clamp {self.spec} has to be right on every score, up to {width:.0f} nats of them, and is not "
            f"in {len(self.bad_layers)} of {len(self.layers)} layers: take a power (poly3^4-l1), a higher even degree "
            "(poly4, poly6), or clamp=True."
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON types."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    def __str__(self) -> str:
        header = ("module", "explained variance", "worst head", "scores", "interval width", "lse spread → residual")
        rows = []
        for layer in self.layers:
            low = min(pair[0] for pair in layer.score_range)
            high = max(pair[1] for pair in layer.score_range)
            worst = min(range(len(layer.width)), key=layer.explained_variance.__getitem__)
            rows.append(
                (
                    layer.path,
                    f"{_mean(layer.explained_variance):.4f}",
                    f"{layer.explained_variance[worst]:.4f} (head {worst})",
                    f"{low:.1f} … {high:.1f}",
                    f"{min(layer.width):.0f} … {max(layer.width):.0f}",
                    f"{_mean(layer.spread):.2f} → {_mean(layer.residual):.2f}",
                )
            )
        verdicts = [self.too_few_rows] if self.too_few_rows else []
        if self.bad_layers:
            verdicts.append(f"these layers fit badly (below {self.BAD_FIT}): {', '.join(self.bad_layers)}.")
        if self.needs_clamp:
            verdicts.append(self.needs_clamp)
        verdict = " ".join(verdicts) or f"every layer fits; {self.worst_head}."
        of = f" of {self.lengths[0]} to {self.lengths[1]} keys" if self.lengths else ""
        return f"{format_table(header, rows)}\n{self.spec}, {self.rows} rows a layer{of}: {verdict}"


def _mean(numbers: tuple[float, ...]) -> float:
    return sum(numbers) / len(numbers)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    spec: str | Polynomial | None = None,
    max_batches: int | None = 16,
    key_shift: bool = True,
    row_shift: str = "auto",
    squares: int | None = None,
    crop: bool | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """Sets the polynomials of a patched model, in place, so that it reproduces its softmax original.

    Other threads may run the model while it is observed; while its polynomials are written, they are refused. A pass
    that has begun before may end with the last layers new.

    Args:
        model: a patched model.
        batches: model inputs, mappings or main-input tensors; padding (by `attention_mask`) is left out.
        spec: another polynomial to give to every patched layer; None fits those that the layers have.
        max_batches: how many of them to use; None for all. A few thousand tokens are enough.
        key_shift: False is the older way to ask for row_shift="none".
        row_shift: what moves the scores of a row: `none`, `linear` in its query, `moments` of its scores too, or
            `auto`, what rows held out ask for. Powers stay linear under auto: they have width to spare.
        squares: linear forms of the query whose squares join the moments; None leaves it to rows held out under auto.
        crop: calibrate on pieces of the texts too, so that the polynomials hold for shorter ones; None does so for
            text encoders whose texts all have about one length.
        progress: show progress bars.

    Returns:
        A report with explained variance, score range and chosen interval of each layer and head.

    Raises:
        PatchError: the model is not patched, or is not running its polynomials.
        CalibrationError: no batches, no visible scores, non-finite activations, or inputs that cannot be cropped. The
            model is left as it was.
        InputError: an unknown row_shift, or squares that do not go with it.
    """
    require_polynomial(model)
    specs = {
        path: child.config.spec if spec is None else Polynomial.parse(spec) for path, child in patched_layers(model)
    }
    taken = with_crops(model, take_batches(batches, max_batches), crop)
    passes = Replay(model, taken, progress=progress)
    choice = choice_for(specs.values(), row_shift if key_shift else "none", squares)
    fits = fit_layers(model, passes, specs, choice)
    write_fits(model, fits)
    first = next(iter(fits.values()))
    unknowns = max(fit.unknowns for fit in fits.values())
    clamp = all(child.config.clamp for _, child in patched_layers(model))
    layers = tuple(fit.report for fit in fits.values())
    report = CalibrationReport(spec_of(model), first.count, layers, unknowns, lengths_of(fits.values()), clamp)
    for said in (report.too_few_rows, report.needs_clamp):
        if said:
            warnings.warn(said, stacklevel=3)  # of `calibrate`, and of torch's decorator around it
    return report


def lengths_of(fits: Iterable[LayerFit]) -> tuple[int, int]:
    """Returns the fewest and the most keys that a row of some fits saw."""
    lengths = [fit.shift.lengths for fit in fits]
    return int(min(fewest for fewest, _ in lengths)), int(max(most for _, most in lengths))


def choice_for(specs: Iterable[Polynomial], row_shift: str, squares: int | None) -> PredictorChoice:
    """Returns the choice of a row shift for a model that is to have these polynomials; see `calibrate`."""
    return PredictorChoice(row_shift, squares, worth_it=any(spec.power == 1 for spec in specs))


def same_shift(model: nn.Module) -> PredictorChoice:
    """Returns the choice of the row shift that a patched model has."""
    config = patched_layers(model)[0][1].config
    return PredictorChoice(config.row_shift, config.squares, worth_it=True)


@torch.no_grad()
def fit_layers(
    model: nn.Module, passes: Replay, specs: Mapping[str, Polynomial], choice: PredictorChoice
) -> dict[str, LayerFit]:
    """Returns the fits of a polynomial for each path of `specs`; the model is left as it is.

    Raises:
        CalibrationError: no visible scores, or non-finite activations.
    """
    children = dict(patched_layers(model))
    fits = {path: LayerFit(path, children[path], spec, choice) for path, spec in specs.items()}
    passes_of, store = {path: fit.passes() for path, fit in fits.items()}, RowStore()
    while wanted := {path: step for path, steps in passes_of.items() if (step := next(steps, None))}:
        titles = dict.fromkeys(step.title for step in wanted.values())
        store.restart()
        passes.run(partial(_show, wanted, store), f"calibrate: {', '.join(titles)}")
    return fits


def _show(
    wanted: Mapping[str, Pass], store: RowStore, path: str, child: PolyAttention, observation: Observation
) -> None:
    """Shows what a layer saw to the fit that wants it."""
    if path in wanted:
        for rows in store.rows(path, observation, wanted[path].stride):
            wanted[path].see(rows)


@torch.no_grad()
def write_fits(model: nn.Module, fits: Mapping[str, LayerFit]) -> None:
    """Gives patched layers the polynomials that were fitted for them, with one predictor of the row shift.

    They are clamped, unless the config of a layer says no. Other threads cannot run the model meanwhile.
    """
    with alone(pretrained_model(model), "calibrate"):
        change_specs(model, {path: fit.config.spec for path, fit in fits.items()})
        clamp = not any(child.config.clamp is False for _, child in patched_layers(model))
        config = next(iter(fits.values())).config
        shift = {name: getattr(config, name) for name in ("row_shift", "squares", "key_shift")}
        reconfigure(model, interval=True, clamp=clamp, lengths=lengths_of(fits.values()), **shift)
        for fit in fits.values():
            fit.write()
