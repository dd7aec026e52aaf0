"""What patched attention does beside softmax, on the same queries and keys: norms, Jacobians and scores.

Theorem 4.1 of arXiv 2410.18613: ‖softmax(A)‖_F ≤ √N and ‖∇softmax(A)‖_F ≤ 2√N for N query rows. A polynomial that
stands in for softmax keeps to the same order of magnitude; one that does not makes training unstable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..adaptation.capture import Observation, observe, take_batches
from ..adaptation.quality import similarity
from ..errors import InputError
from ..patching.core import PolyAttention
from ..patching.patched import patched_layers
from ..patching.running import require_polynomial
from .inspection import (
    interval_scores,
    polynomial_squares,
    scaled_scores,
    softmax_squares,
    weights_and_slopes,
)
from .report import Diagnosis, LayerDiagnosis

MAX_ROWS = 512  # query rows of a batch that each layer is measured on
_BLOCK_SCORES = 2**18


@torch.no_grad()
def diagnose(
    model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = 8, progress: bool = True
) -> Diagnosis:
    """Returns what the polynomials of a patched model do beside softmax, layer by layer and head by head.

    Teacher-forced: softmax runs, and both activations are applied to the queries and keys that each layer sees then.
    At last the whole model runs under both, and its outputs are compared.
    Nothing is changed. Of a batch with more than 512 query rows every layer is measured on evenly spaced ones, at most
    512 unless it has more sequences than that; norms are scaled to all rows. Memory is bounded: scores are formed in
    blocks. Non-finite numbers are counted, not raised.

    Args:
        model: a patched model.
        batches: model inputs, mappings or main-input tensors; padding (by `attention_mask`) is left out.
        max_batches: how many of them to use; None for all.
        progress: show a progress bar.

    Raises:
        PatchError: the model is not patched, or is not running its polynomials.
        CalibrationError: no batches, or one that is not a model input.
        InputError: a layer that no row of the batches reaches.

    Source of the bounds: arXiv 2410.18613, Theorem 4.1.
    """
    require_polynomial(model)
    layers = patched_layers(model)
    sums = {path: _LayerSums(path, layer) for path, layer in layers}

    def observer(path: str, layer: PolyAttention, seen: Observation) -> None:
        sums[path].see(seen)

    taken = take_batches(batches, max_batches)
    observe(model, taken, observer, progress=progress, title="diagnose")
    found = tuple(layer.finish() for layer in sums.values())
    return Diagnosis(str(layers[0][1].config.spec), found, _agreement(model, taken))


def _agreement(model: nn.Module, batches: list[Any]) -> float | None:
    """Returns the similarity of a model's outputs to softmax's; None where they cannot be compared."""
    try:
        found = similarity(model, batches)
    except InputError:
        return None
    return found if math.isfinite(found) else None


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
        visible = seen.visible(rows, entries)
        measured = query.shape[0] * len(rows)
        if seen.real is not None:
            visible = visible & seen.real[entries, None, chosen, None]
            measured = int(seen.real[entries, chosen].sum())
        visible = visible.expand(query.shape[0], layer.heads, -1, -1)
        scores = scaled_scores(query.to(self.dtype), key.to(self.dtype), seen.scaling)
        t = interval_scores(layer, query.to(self.dtype), scores, visible, seen.scaling)
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
            clamp=self.layer.config.clamp is not False or not outside,
        )


def _blocks(batch: int, rows: range, row_scores: int) -> Iterator[tuple[slice, range]]:
    """Yields batch entries and query rows that have at most `_BLOCK_SCORES` scores, but at least one row."""
    q_step = max(1, min(len(rows), _BLOCK_SCORES // row_scores))
    b_step = max(1, _BLOCK_SCORES // (q_step * row_scores))
    for entry in range(0, batch, b_step):
        for start in range(0, len(rows), q_step):
            yield slice(entry, entry + b_step), rows[start : start + q_step]
