"""A few query rows of a batch, on which a monitor measures scores and norms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops.masks import visible_keys
from ..patching.core import PolyAttention
from .inspection import (
    interval_scores,
    polynomial_squares,
    scaled_scores,
    softmax_squares,
    weights_and_slopes,
)

SAMPLED_ENTRIES, SAMPLED_ROWS = 4, 8  # of a batch


@dataclass(frozen=True, slots=True)
class Sample:
    """Evenly spaced query rows of an attention module.

    Attributes:
        query: (B, H, rows, D), float32, of at most `SAMPLED_ENTRIES` entries and `SAMPLED_ROWS` rows of each.
        scores: scaled, (B, H, rows, Tk), float32.
        visible: bool (B or 1, H or 1, rows, Tk), the keys that they see.
        scaling: of the scores.
    """

    query: Tensor
    scores: Tensor
    visible: Tensor
    scaling: float


def sample_rows(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    ranges: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scaling: float | None = None,
) -> Sample:
    """Returns a few rows of a call of `polynomial_attention`; arguments as there."""
    batch, _, q_len, head_dim = query.shape
    entries = slice(None, None, -(-batch // SAMPLED_ENTRIES))
    step = -(-q_len // SAMPLED_ROWS)
    rows = range((step - 1) // 2, q_len, step)
    mask, ranges = (part if part is None or part.shape[0] == 1 else part[entries] for part in (mask, ranges))
    visible = visible_keys(
        rows, key.shape[2], mask=mask, ranges=ranges, causal=causal, window=window, device=query.device
    )
    scaling = head_dim**-0.5 if scaling is None else scaling
    query, key = query[entries, :, rows.start :: rows.step].float(), key[entries].float()
    return Sample(query, scaled_scores(query, key, scaling), visible, scaling)


def shares_outside(layer: PolyAttention, sample: Sample) -> tuple[Tensor, Tensor]:
    """Returns which shares of the visible scores are outside the interval, and above it; 0-dim tensors."""
    visible = sample.visible
    t = interval_scores(layer, sample.query, sample.scores, visible, sample.scaling)
    count = visible.expand(t.shape).sum().clamp(min=1)
    return (visible & (t.abs() > 1.0)).sum() / count, (visible & (t > 1.0)).sum() / count


def polynomial_norms(layer: PolyAttention, sample: Sample) -> tuple[Tensor, Tensor]:
    """Returns ‖A‖_F/√N and ‖∇A‖_F/√N of a layer, of the head where they are largest; 0-dim tensors."""
    visible = sample.visible
    t = interval_scores(layer, sample.query, sample.scores, visible, sample.scaling)
    weight, slope = weights_and_slopes(layer, t, visible)
    return _largest(polynomial_squares(weight, slope, visible, layer.config.spec.normalizer), visible)


def softmax_norms(sample: Sample) -> tuple[Tensor, Tensor]:
    """Returns what `polynomial_norms` does, for softmax of the same scores."""
    return _largest(softmax_squares(sample.scores, sample.visible), sample.visible)


def _largest(squares: tuple[Tensor, Tensor], visible: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the roots of the mean squares over the rows that see something, of the largest head each."""
    seen = visible.any(-1).expand(squares[0].shape)
    rows = seen.sum((0, 2)).clamp(min=1)
    norm, jacobian = ((s.masked_fill(~seen, 0.0).clamp(min=0.0).sum((0, 2)) / rows).sqrt().amax() for s in squares)
    return norm, jacobian
