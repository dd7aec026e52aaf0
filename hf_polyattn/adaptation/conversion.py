"""Mixed conversion: for every layer the cheapest polynomial that keeps the whole model above a floor, calibration only.

Every spec of the dial is fitted to every layer once. Each layer then tries each spec alone, the others lossless, and
what the whole model loses by that is the layer's loss. A threshold on the losses gives each layer the cheapest spec
whose loss does not exceed it; the largest threshold that keeps the floor, measured on the whole model, is found by
bisection.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import InputError, PolyAttnError
from ..figures import draw_conversion, save
from ..patching.patched import patched_layers
from ..patching.running import require_polynomial
from ..spec import Polynomial
from ..tables import format_table
from .calibration import choice_for, fit_layers, write_fits
from .capture import Replay, take_batches
from .crops import with_crops
from .fitting.layer import LayerFit
from .progress import hidden
from .quality import Quality, similarity

DIAL = ("poly3", "poly3-l1", "poly4-l1", "poly6-l1", "poly3^4-l1", "poly3^8-l1", "poly3^16-l1")


def cost(spec: Polynomial) -> int:
    """Returns the multiplications and additions that a spec spends on one score beside the two matrix products.

    One multiply-add a degree, one multiplication a squaring, and one addition for the row sum of l1.

    >>> [cost(Polynomial.parse(spec)) for spec in ("poly3", "poly6-l1", "poly3^16-l1")]
    [3, 7, 8]
    """
    return spec.degree + spec.power.bit_length() - 1 + (spec.normalizer == "l1")


@dataclass(frozen=True, slots=True)
class Conversion:
    """One measured choice of specs.

    Attributes:
        specs: by path of the attention module.
        cost: mean over the layers, see `cost`.
        quality: of the whole model.
    """

    specs: dict[str, str]
    cost: float
    quality: float


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What `convert` measured and chose; prints as a table.

    Attributes:
        floor: that the quality had to keep.
        chosen: the cheapest measured choice above it.
        uniform: the same spec in every layer, along the dial.
        mixed: what the bisection measured.
        losses: path -> spec -> what the model loses with it in that layer alone.
    """

    floor: float
    chosen: Conversion
    uniform: tuple[Conversion, ...]
    mixed: tuple[Conversion, ...]
    losses: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON types."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    def __str__(self) -> str:
        dial = [
            (next(iter(point.specs.values())), f"{point.cost:.1f}", f"{point.quality:.5f}") for point in self.uniform
        ]
        dial.append(("chosen, layer by layer", f"{self.chosen.cost:.1f}", f"{self.chosen.quality:.5f}"))
        layers = [(path, spec, f"{self.losses[path].get(spec, 0.0):.2g}") for path, spec in self.chosen.specs.items()]
        return "\n".join(
            [
                format_table(("every layer", "operations a score", "quality"), dial),
                "",
                format_table(("module", "chosen", "loss by it alone"), layers),
                f"the floor is {self.floor:g}",
            ]
        )

    def plot(self, path: str | Path) -> None:
        """Writes a picture of quality against cost along the dial, in the format of the suffix; needs matplotlib."""
        save(draw_conversion(self), path)


class QualityError(PolyAttnError):
    """A quality floor that no choice of polynomials keeps."""


@torch.no_grad()
def convert(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    floor: float = 0.99,
    specs: Sequence[str | Polynomial] = DIAL,
    quality: Quality | None = None,
    max_batches: int = 8,
    key_shift: bool = True,
    row_shift: str = "auto",
    progress: bool = True,
) -> ConversionReport:
    """Gives every layer of a patched model, in place, the cheapest spec that keeps the whole above a floor.

    Args:
        model: patched, with any spec; its weights are the pretrained ones and stay so.
        batches: model inputs, see `calibrate`: all but the last quarter (at least one) calibrate, those measure.
        floor: the least quality allowed.
        specs: to choose from; the last one is the one that loses least.
        quality: called with the model; None takes its `similarity` to softmax on the measuring batches.
        max_batches: how many batches to use.
        key_shift, row_shift: see `calibrate`.
        progress: show progress bars.

    Returns:
        What was measured along the dial, each layer's losses and the choice.

    Raises:
        PatchError: the model is not patched, or is not running its polynomials.
        InputError: fewer than two batches or two specs.
        QualityError: the last spec alone falls below the floor. The model then has it in every layer.
    """
    require_polynomial(model)
    dial = Polynomial.parse_several(specs)
    taken = take_batches(batches, max_batches)
    if len(dial) < 2 or len(taken) < 2:
        raise InputError(f"convert needs at least two specs and two batches, got {len(dial)} and {len(taken)}")
    held_out = max(1, len(taken) // 4)
    if quality is None:
        quality = partial(similarity, batches=taken[-held_out:])
    passes = Replay(model, with_crops(model, taken[:-held_out], None), progress=progress)
    search = _Search(model, dial, quality, passes, row_shift if key_shift else "none")
    uniform = [search.measure(dict.fromkeys(search.paths, spec)) for spec in dial]
    best = uniform[-1]
    if best.quality < floor:
        raise QualityError(f"{dial[-1]} in every layer has quality {best.quality:.5f}, below the floor of {floor:g}")

    losses: dict[str, dict[Polynomial, float]] = {path: {dial[-1]: 0.0} for path in search.paths}
    lossless = dict.fromkeys(search.paths, dial[-1])
    tries = [(path, spec) for path in search.paths for spec in dial[:-1]]
    for path, spec in tqdm(tries, desc="convert: layers", disable=hidden(progress), leave=False):
        losses[path][spec] = max(0.0, best.quality - search.measure({**lossless, path: spec}).quality)

    thresholds = sorted({loss for own in losses.values() for loss in own.values()})
    mixed: list[Conversion] = []
    low, high = 0, len(thresholds)  # thresholds[low] keeps the floor, thresholds[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        mixed.append(search.measure(_cheapest(losses, thresholds[middle])))
        low, high = (middle, high) if mixed[-1].quality >= floor else (low, middle)
    kept = [point for point in (*uniform, *mixed) if point.quality >= floor]
    chosen = min(kept, key=lambda point: (point.cost, -point.quality))
    search.write({path: Polynomial.parse(spec) for path, spec in chosen.specs.items()})
    readable = {path: {str(spec): loss for spec, loss in own.items()} for path, own in losses.items()}
    return ConversionReport(floor, chosen, tuple(uniform), tuple(mixed), readable)


def _cheapest(losses: Mapping[str, Mapping[Polynomial, float]], threshold: float) -> dict[str, Polynomial]:
    return {
        path: min((spec for spec, loss in own.items() if loss <= threshold), key=lambda spec: (cost(spec), own[spec]))
        for path, own in losses.items()
    }


class _Search:
    """The fits of every spec to every layer, and what the model is worth with some of them."""

    def __init__(
        self, model: nn.Module, dial: Sequence[Polynomial], quality: Quality, passes: Replay, row_shift: str
    ) -> None:
        self.model, self.quality = model, quality
        self.paths = [path for path, _ in patched_layers(model)]
        choice = choice_for(dial, row_shift, None)  # one for all, as a model has one
        self.fits: dict[Polynomial, dict[str, LayerFit]] = {
            spec: fit_layers(model, passes, dict.fromkeys(self.paths, spec), choice) for spec in dial
        }

    def write(self, specs: Mapping[str, Polynomial]) -> None:
        fits = {path: self.fits[spec][path] for path, spec in specs.items()}
        write_fits(self.model, fits)

    def measure(self, specs: Mapping[str, Polynomial]) -> Conversion:
        self.write(specs)
        mean_cost = sum(cost(spec) for spec in specs.values()) / len(specs)
        return Conversion({path: str(spec) for path, spec in specs.items()}, mean_cost, self.quality(self.model))
