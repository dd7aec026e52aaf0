"""What patched attention does beside softmax, on the same queries and keys: norms, Jacobians and scores.

Theorem 4.1 of arXiv 2410.18613: ‖softmax(A)‖_F ≤ √N and ‖∇softmax(A)‖_F ≤ 2√N for N query rows. A polynomial that
stands in for softmax keeps to the same order of magnitude; one that does not makes training unstable.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adaptation.capture import Observation, observe, take_batches
from ..errors import InputError, PatchError
from ..patching.core import PolyAttention, is_patched
from ..patching.patched import patched_layers
from ..tables import format_table
from .inspection import (
    interval_scores,
    polynomial_squares,
    scaled_scores,
    softmax_squares,
    visible_keys,
    weights_and_slopes,
)

MAX_ROWS = 512  # query rows of a batch that each layer is measured on
_BLOCK_SCORES = 2**18


@dataclass(frozen=True, slots=True)
class LayerDiagnosis:
    """One attention module. Tuples have one entry a query head; norms are of the attention matrix of one sequence,
    root mean square over the sequences, and without padding.

    Attributes:
        path: of the attention module.
        rows: N, query rows of a sequence that are not padding, mean over the sequences.
        softmax_norm, polynomial_norm: Frobenius norm of the attention matrix.
        softmax_jacobian, polynomial_jacobian: Frobenius norm of its Jacobian with respect to the scaled scores.
        score_range: lowest and highest score in units of t: the calibrated interval is [−1, 1].
        below, above: shares of the visible scores below and above the interval; None where there is none. Many
            below are as it should be, since softmax is almost nil there; few should be above.
        non_finite: how many visible scores, or weights p(t)^s, float32 cannot hold.
    """

    path: str
    rows: float
    softmax_norm: tuple[float, ...]
    polynomial_norm: tuple[float, ...]
    softmax_jacobian: tuple[float, ...]
    polynomial_jacobian: tuple[float, ...]
    score_range: tuple[tuple[float, float], ...]
    below: tuple[float, ...] | None
    above: tuple[float, ...] | None
    non_finite: tuple[int, ...]

    @property
    def bound(self) -> float:
        """√N, which softmax's norm cannot exceed."""
        return math.sqrt(self.rows)

    @property
    def jacobian_bound(self) -> float:
        """2√N, which the norm of softmax's Jacobian cannot exceed."""
        return 2.0 * math.sqrt(self.rows)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `diagnose` found; prints as a table and says which layers need attention.

    Attributes:
        spec: the polynomial.
        layers: one `LayerDiagnosis` per patched attention module, in model order.
    """

    spec: str
    layers: tuple[LayerDiagnosis, ...]

    #: A mean norm that differs from softmax's by more than this factor is said to be unlike it.
    UNLIKE = 2.0
    #: A layer with a larger share of its scores above the interval is said to have left it.
    ABOVE = 0.01

    def to_dict(self) -> dict[str, Any]:
        """Returns the diagnosis as JSON types; None for a norm that is not finite."""
        return _json(asdict(self))  # type: ignore[no-any-return]

    @property
    def verdict(self) -> str:
        """What is wrong in which layers, and what to do, in plain words."""
        found = {
            "scores or weights are not finite ({}): go back to weights before that": [
                layer.path for layer in self.layers if any(layer.non_finite)
            ],
            "scores leave the calibrated interval at its top ({}): calibrate on data like this": [
                layer.path for layer in self.layers if layer.above is not None and _mean(layer.above) > self.ABOVE
            ],
            f"norms differ from softmax's by more than a factor of {self.UNLIKE:g} ({{}}): calibrate, then train": [
                layer.path for layer in self.layers if self._is_unlike(layer)
            ],
        }
        said = [
            text.format("every layer" if len(paths) == len(self.layers) > 1 else ", ".join(paths))
            for text, paths in found.items()
            if paths
        ]
        return "; ".join(said) + "." if said else "norms are like softmax's, and scores in their intervals."

    def _is_unlike(self, layer: LayerDiagnosis) -> bool:
        ratio = _mean(layer.polynomial_norm) / max(_mean(layer.softmax_norm), 1e-30)
        return not 1.0 / self.UNLIKE <= ratio <= self.UNLIKE

    def __str__(self) -> str:
        norm, jacobian = "norm / √N", "Jacobian / 2√N"
        header = ("module", f"softmax {norm}", norm, f"softmax {jacobian}", jacobian, "outside %", "non-finite")
        rows = []
        for layer in self.layers:
            outside = "no interval"
            if layer.below is not None and layer.above is not None:
                outside = f"{100 * _mean(layer.below):.2f} below, {100 * _mean(layer.above):.2f} above"
            rows.append(
                (
                    layer.path,
                    f"{_mean(layer.softmax_norm) / layer.bound:.3f}",
                    f"{_mean(layer.polynomial_norm) / layer.bound:.3g}",
                    f"{_mean(layer.softmax_jacobian) / layer.jacobian_bound:.3f}",
                    f"{_mean(layer.polynomial_jacobian) / layer.jacobian_bound:.3g}",
                    outside,
                    sum(layer.non_finite),
                )
            )
        return f"{format_table(header, rows)}\n{self.spec}, means over heads: {self.verdict}"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture, in the format of the suffix (PNG without one): norms left, Jacobian norms right.

        Lines are means over heads, bands reach from the lowest head to the highest, dashes are softmax's bounds.
        Needs matplotlib.
        """
        from matplotlib.figure import Figure

        target = Path(path)
        figure = Figure(figsize=(11.0, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw(left, "Attention matrix ‖A‖", "√N", self, ("softmax_norm", "polynomial_norm", "bound"))
        _draw(right, "Jacobian ‖∇A‖", "2√N", self, ("softmax_jacobian", "polynomial_jacobian", "jacobian_bound"))
        unfinished = target.with_name(f".{target.name}.unfinished")
        figure.savefig(unfinished, format=target.suffix[1:] or "png", dpi=150)
        unfinished.replace(target)


@torch.no_grad()
def diagnose(
    model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = 8, progress: bool = True
) -> Diagnosis:
    """Returns what the polynomials of a patched model do beside softmax, layer by layer and head by head.

    Teacher-forced: softmax runs, and both activations are applied to the queries and keys that each layer sees then.
    Nothing is changed. Of a batch with more than 512 query rows every layer is measured on evenly spaced ones, at most
    512 unless it has more sequences than that; norms are scaled to all rows. Memory is bounded: scores are formed in
    blocks. Non-finite numbers are counted, not raised.

    Args:
        model: a patched model.
        batches: model inputs, mappings or main-input tensors; padding (by `attention_mask`) is left out.
        max_batches: how many of them to use; None for all.
        progress: show a progress bar.

    Raises:
        PatchError: the model is not patched.
        CalibrationError: no batches, or one that is not a model input.
        InputError: a layer that no row of the batches reaches.

    Source of the bounds: arXiv 2410.18613, Theorem 4.1.
    """
    if not is_patched(model):
        raise PatchError(f"{type(model).__name__} is not patched; call patch_model(model, spec) first")
    layers = patched_layers(model)
    sums = {path: _LayerSums(path, layer) for path, layer in layers}

    def observer(path: str, layer: PolyAttention, seen: Observation) -> None:
        sums[path].see(seen)

    observe(model, take_batches(batches, max_batches), observer, progress=progress, title="diagnose")
    return Diagnosis(str(layers[0][1].config.spec), tuple(layer.finish() for layer in sums.values()))


class _LayerSums:
    """Sums over the query rows of one attention module, float64, one a head."""

    def __init__(self, path: str, layer: PolyAttention) -> None:
        device = layer.coefficients.device
        self.path, self.layer = path, layer
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.rows = self.sequences = self.measured = 0.0
        self.squares = torch.zeros(4, layer.heads, dtype=self.dtype, device=device)
        self.lowest = torch.full((layer.heads,), torch.inf, dtype=self.dtype, device=device)
        self.highest = -self.lowest
        self.below, self.above, self.scores, self.non_finite = torch.zeros_like(self.squares)

    def see(self, seen: Observation) -> None:
        """Adds the rows of one batch."""
        batch, heads, q_len, _ = seen.query.shape
        stride = min(q_len, math.ceil(batch * q_len / MAX_ROWS))
        for entries, rows in _blocks(batch, range((stride - 1) // 2, q_len, stride), heads * seen.key.shape[2]):
            self._see_block(seen, entries, rows, stride)
        lengths = torch.full((batch,), q_len) if seen.real is None else seen.real.sum(-1)
        self.rows += float(lengths.sum())
        self.sequences += float((lengths > 0).sum())

    def _see_block(self, seen: Observation, entries: slice, rows: range, stride: int) -> None:
        layer, chosen = self.layer, slice(rows.start, rows.stop, rows.step)
        query, key = seen.query[entries, :, chosen], seen.key[entries]
        visible = visible_keys(
            rows,
            key.shape[2],
            mask=seen.mask if seen.mask is None or seen.mask.shape[0] == 1 else seen.mask[entries],
            ranges=None,
            causal=seen.causal,
            window=seen.window,
            device=query.device,
        )
        measured = query.shape[0] * len(rows)
        if seen.real is not None:
            visible = visible & seen.real[entries, None, chosen, None]
            measured = int(seen.real[entries, chosen].sum())
        visible = visible.expand(query.shape[0], layer.heads, -1, -1)
        scores = scaled_scores(query.to(self.dtype), key.to(self.dtype), seen.scaling)
        t = interval_scores(layer, query.to(self.dtype), scores, seen.scaling)
        weight, slope = weights_and_slopes(layer, t, visible)
        squares = (*softmax_squares(scores, visible), *polynomial_squares(weight, slope, visible, self._normalizer))
        # A row that sees nothing adds nothing, whatever stands in it: padding may be anything.
        empty = ~visible.any(-1)
        self.squares += stride * torch.stack([square.masked_fill(empty, 0.0).sum((0, 2)) for square in squares])
        self.measured += stride * measured

        finite = visible & t.isfinite()
        self.lowest = torch.minimum(self.lowest, t.masked_fill(~finite, torch.inf).amin((0, 2, 3)))
        self.highest = torch.maximum(self.highest, t.masked_fill(~finite, -torch.inf).amax((0, 2, 3)))
        self.below += (finite & (t < -1.0)).sum((0, 2, 3))
        self.above += (finite & (t > 1.0)).sum((0, 2, 3))
        self.scores += visible.sum((0, 2, 3))
        self.non_finite += (visible & ~(t.float().isfinite() & weight.float().isfinite())).sum((0, 2, 3))

    @property
    def _normalizer(self) -> str:
        return self.layer.config.spec.normalizer

    def finish(self) -> LayerDiagnosis:
        """Returns what the sums say."""
        if self.measured == 0:
            raise InputError(
                f"no query row of {self.path!r} that is not padding was seen. Pass batches that run this layer, with "
                "real tokens in their attention_mask."
            )
        rows = self.rows / self.sequences
        norms = [tuple(norm) for norm in (self.squares / self.measured * rows).sqrt().tolist()]
        outside = self.layer.config.interval
        return LayerDiagnosis(
            path=self.path,
            rows=rows,
            softmax_norm=norms[0],
            softmax_jacobian=norms[1],
            polynomial_norm=norms[2],
            polynomial_jacobian=norms[3],
            score_range=tuple(zip(self.lowest.tolist(), self.highest.tolist(), strict=True)),
            below=tuple((self.below / self.scores).tolist()) if outside else None,
            above=tuple((self.above / self.scores).tolist()) if outside else None,
            non_finite=tuple(int(count) for count in self.non_finite.tolist()),
        )


def _blocks(batch: int, rows: range, row_scores: int) -> Iterator[tuple[slice, range]]:
    """Yields batch entries and query rows that have at most `_BLOCK_SCORES` scores, but at least one row."""
    q_step = max(1, min(len(rows), _BLOCK_SCORES // row_scores))
    b_step = max(1, _BLOCK_SCORES // (q_step * row_scores))
    for entry in range(0, batch, b_step):
        for start in range(0, len(rows), q_step):
            yield slice(entry, entry + b_step), rows[start : start + q_step]


def _mean(numbers: tuple[float, ...]) -> float:
    return sum(numbers) / len(numbers)


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(axes: Any, title: str, bound: str, diagnosis: Diagnosis, names: tuple[str, str, str]) -> None:
    """Draws one norm of softmax and of the polynomial over the layers, and softmax's bound."""
    numbers = range(len(diagnosis.layers))
    for name, label, color in ((names[0], "softmax", "tab:blue"), (names[1], diagnosis.spec, "tab:orange")):
        heads = [getattr(layer, name) for layer in diagnosis.layers]
        axes.plot(numbers, [_mean(layer) for layer in heads], "o-", markersize=4, color=color, label=label)
        axes.fill_between(
            numbers, [min(layer) for layer in heads], [max(layer) for layer in heads], color=color, alpha=0.15, lw=0
        )
    bounds = [getattr(layer, names[2]) for layer in diagnosis.layers]
    axes.plot(numbers, bounds, "--", color="black", label=f"softmax's bound {bound}")
    axes.set(title=f"{title}, mean and range over heads", xlabel="patched layer", ylabel="Frobenius norm", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
