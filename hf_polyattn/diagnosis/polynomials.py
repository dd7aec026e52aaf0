"""The polynomials of a patched model as plain numbers, and what they cost where every product of secrets counts.

    w_ij = (Σ_k a_hk (x_ij − s_i)^k)^s = (Σ_k c_hk t_ij^k)^s        t_ij = (x_ij − s_i − center_h) / radius_h

with the raw score x_ij = scaling · q_i·k_j and s_i the row shift, 0 where there is none; with a clamp t is limited to
[−1, 1], which only the second form has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adaptation.capture import Observation, observe, take_batches
from ..adaptation.fitting.rows import observed_rows
from ..errors import PatchError
from ..patching.core import PolyAttention, is_patched
from ..patching.patched import patched_layers, spec_of
from ..tables import format_table
from .inspection import interval_scores


@dataclass(frozen=True, slots=True)
class HeadPolynomial:
    """The polynomial of one head, before its power and its row scale; numbers are float64.

    Attributes:
        in_score: a_0 … a_P, ascending powers of x − s_i: of the raw score x where rows are not shifted.
        in_interval: c_0 … c_P, ascending powers of t.
        interval: of x − s_i, where t is in [−1, 1]; None without one.
        score_range: lowest and highest raw score x that was measured; None without batches.
        shifted_range: the same of x − s_i.
    """

    in_score: tuple[float, ...]
    in_interval: tuple[float, ...]
    interval: tuple[float, float] | None
    score_range: tuple[float, float] | None = None
    shifted_range: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class LayerPolynomial:
    """The attention of one module, and its cost. Secret is what depends on the input; the model's numbers are known.

    Attributes:
        path: of the attention module.
        spec, degree, power, refinements, normalizer: of its polynomial.
        clamp: whether t is limited: comparisons of every score.
        row_shift, squares: what moves the rows, of `PolyAttentionConfig`.
        head_dim: D, of queries and keys, and of the values here.
        depth: products of two secret values one after the other, on the longest path from q, k and v to the output:
            1 for the scores; 3 for the moments of the row (x², v², v³), if they shift it; ⌈log₂ degree⌉ + log₂ power
            for the polynomial; for each refinement as much again, and 2 for its step of degree 4; 1 for the values;
            1 for l1, where the output meets the inverse of the row sum.
        divisions: inverses of secret numbers a row, 1 for l1: their own depth is that of whatever stands in for them,
            and is not in `depth`.
        heads: one a query head.
    """

    path: str
    spec: str
    degree: int
    power: int
    refinements: int
    normalizer: str
    clamp: bool
    row_shift: str
    squares: int
    head_dim: int
    depth: int
    divisions: int
    heads: tuple[HeadPolynomial, ...]

    def products(self, length: int) -> dict[str, int]:
        """Returns how many products of two secret numbers the layer takes for a sequence, by part.

        Every power of t is one product, so p takes degree − 1; a square root of that many would do for high degrees.

        Args:
            length: T, of a sequence of which every row sees all.
        """
        scores, rows = len(self.heads) * length**2, len(self.heads) * length
        powers = self.degree - 1 + self.power.bit_length() - 1
        moments = self.row_shift == "moments"
        return {
            "scores": scores * self.head_dim,
            "row shift": (scores + rows * (4 + self.squares)) if moments else 0,
            "refinements": self.refinements * (scores * powers + 3 * rows),
            "polynomial": scores * powers,
            "values": scores * self.head_dim,
            "row sum": rows * self.head_dim if self.divisions else 0,
        }

    def ciphertexts(self, length: int, slots: int = 2**15) -> int:
        """Returns the products of two ciphertexts, if each holds `slots` numbers and every slot is used."""
        return sum(math.ceil(count / slots) for count in self.products(length).values())


@dataclass(frozen=True, slots=True)
class Polynomials:
    """What `polynomials` found; prints as a table.

    Attributes:
        spec: of the model.
        layers: one `LayerPolynomial` per patched attention module, in model order.
    """

    spec: str
    layers: tuple[LayerPolynomial, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON types."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    def __str__(self) -> str:
        header = ("module", "head", "powers of x − s", "interval", "scores", "depth", "divisions")
        rows = []
        for layer in self.layers:
            for number, head in enumerate(layer.heads):
                rows.append(
                    (
                        layer.path,
                        number,
                        " ".join(f"{a:.3g}" for a in head.in_score),
                        _range(head.interval, "none") + ("" if layer.clamp or head.interval is None else ", no clamp"),
                        _range(head.score_range, "not measured"),
                        layer.depth,
                        layer.divisions,
                    )
                )
        return f"{format_table(header, rows)}\n{self.spec}; s is the row shift, {self.layers[0].row_shift}"


@torch.no_grad()
def polynomials(
    model: nn.Module, batches: Iterable[Any] | None = None, *, max_batches: int | None = 8, progress: bool = True
) -> Polynomials:
    """Returns the polynomial of every layer and head of a patched model, its interval, degree and multiplicative depth.

    Args:
        model: a patched model; nothing is changed.
        batches: model inputs, over which softmax runs to measure the scores; None measures nothing.
        max_batches: how many of them to use; None for all.
        progress: show a progress bar.

    Raises:
        PatchError: the model is not patched.
        CalibrationError: no batches in `batches`, or scores that are not finite.

    Source: DESIGN.md, "The mathematics".
    """
    if not is_patched(model):
        raise PatchError(f"{type(model).__name__} is not patched; call patch_model(model, spec) first")
    layers = patched_layers(model)
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    if batches is not None:
        ranges = _measured(model, take_batches(batches, max_batches), progress)
    return Polynomials(spec_of(model), tuple(_layer(path, child, ranges.get(path)) for path, child in layers))


def coefficients_of(child: PolyAttention) -> Tensor:
    """Returns c_hk, (H, P + 1), float64: the one place here that reads them."""
    return child.changed_coefficients().detach().double().expand(child.heads, -1)


def in_powers_of_score(coefficients: Tensor, center: Tensor, radius: Tensor) -> Tensor:
    """Returns a_hk of Σ_k a_k u^k = Σ_k c_k ((u − center) / radius)^k, float64 (H, P + 1).

    Args:
        coefficients: c_hk, (H, P + 1).
        center, radius: (H,).
    """
    size = coefficients.shape[1]
    found = torch.zeros_like(coefficients)
    for k in range(size - 1, -1, -1):  # Horner, on polynomials
        shifted = torch.cat([torch.zeros_like(found[:, :1]), found[:, :-1]], 1)
        found = (shifted - center[:, None] * found) / radius[:, None]
        found[:, 0] += coefficients[:, k]
    return found


def _layer(path: str, child: PolyAttention, ranges: tuple[Tensor, Tensor] | None) -> LayerPolynomial:
    config, spec = child.config, child.config.spec
    c = coefficients_of(child).cpu()
    center, radius = (tensor.detach().double().cpu() for tensor in (child.center, child.radius))
    if not config.interval:
        center, radius = torch.zeros_like(center), torch.ones_like(radius)
    in_score = in_powers_of_score(c, center, radius)
    intervals = [(float(a - b), float(a + b)) if config.interval else None for a, b in zip(center, radius, strict=True)]
    measured = [(None, None)] * child.heads if ranges is None else _pairs(ranges)
    heads = [
        HeadPolynomial(tuple(a.tolist()), tuple(b.tolist()), interval, *pair)
        for a, b, interval, pair in zip(in_score, c, intervals, measured, strict=True)
    ]
    own = math.ceil(math.log2(spec.degree)) + spec.power.bit_length() - 1
    l1 = int(spec.normalizer == "l1")
    shift = 3 if config.row_shift == "moments" else 0
    return LayerPolynomial(
        path=path,
        spec=str(spec),
        degree=spec.degree,
        power=spec.power,
        refinements=spec.refinements,
        normalizer=spec.normalizer,
        clamp=bool(config.clamp),
        row_shift=config.row_shift,
        squares=config.squares,
        head_dim=child.head_dim,
        depth=1 + shift + spec.refinements * (own + 2) + own + 1 + l1,
        divisions=l1,
        heads=tuple(heads),
    )


def _measured(model: nn.Module, batches: list[Any], progress: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns for each layer the extremes of x and of x − s_i, (H, 2) each."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def observer(path: str, child: PolyAttention, seen: Observation) -> None:
        for rows in observed_rows(path, seen, 1):
            visible = rows.visible.bool() & (rows.weight > 0.0).unsqueeze(-1)
            t = interval_scores(child, rows.query, rows.scores, rows.visible.bool(), rows.scaling)
            center, radius = (x.detach()[:, None, None] for x in (child.center, child.radius))
            shifted = t * radius + center if child.config.interval else t
            now = tuple(_extremes(scores, visible) for scores in (rows.scores, shifted))
            before = found.get(path, now)
            found[path] = tuple(_widest(a, b) for a, b in zip(before, now, strict=True))  # type: ignore[assignment]

    observe(model, batches, observer, progress=progress, title="polynomials")
    return found


def _extremes(scores: Tensor, visible: Tensor) -> Tensor:
    lowest = scores.masked_fill(~visible, torch.inf).amin((0, 2, 3))
    return torch.stack([lowest, scores.masked_fill(~visible, -torch.inf).amax((0, 2, 3))], -1)


def _widest(one: Tensor, other: Tensor) -> Tensor:
    return torch.stack([torch.minimum(one[:, 0], other[:, 0]), torch.maximum(one[:, 1], other[:, 1])], -1)


def _pairs(ranges: tuple[Tensor, Tensor]) -> list[Any]:
    return [(tuple(a), tuple(b)) for a, b in zip(*(extremes.double().tolist() for extremes in ranges), strict=True)]


def _range(pair: tuple[float, float] | None, otherwise: str) -> str:
    return otherwise if pair is None else f"{pair[0]:.3g} … {pair[1]:.3g}"
