"""A whole attention module by the Triton kernels, without gradients: polynomial, row shift, refinements, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...spec import NORMALIZERS
from ..call import Call
from . import launch
from .arguments import Refinement, Shift

#: For rows of at most so many keys the kernel finds the moments itself, by one look more; beyond, sums over the keys.
LONGEST_LOOK = 1024
_TENSORS = 6  # of a refinement
_MOMENTS = ("weights", "means", "scales", "length_shift", "squares", "lengths")


def layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    polynomial: Sequence[Tensor],
    shift: Sequence[Tensor],
    refinements: Sequence[Tensor],
    moments: tuple[Tensor, Tensor] | None,
    pattern: Sequence[Any],
    settings: Sequence[Any],
) -> Tensor:
    """Returns the output (B, Tq, H, Dv).

    Args:
        query, key, value: of the operator.
        polynomial, shift, refinements: as of `ops.layer.fused_layer`; there is a shift.
        moments: mean and variance of the scores of each row, (B, H, Tq); None where the kernel finds them.
        pattern: mask, ranges, seed, causal, window, scaling.
        settings: log2 of the power, number of the normalizer, clamp, interval, α, dropout.
    """
    mask, ranges, seed, causal, window, scaling = pattern
    squarings, normalizer, clamp, interval, _, dropout = settings
    batch, heads, q_len, _ = query.shape
    *changing, center, radius = polynomial
    call = Call(
        query=query, key=key, value=value, coefficients=_changed(changing, heads), mask=mask, ranges=ranges,
        center=center[None, :, None].expand(batch, heads, q_len), radius=radius if interval else None, seed=seed,
        causal=causal, window=window, scaling=scaling, power=1 << squarings, normalizer=NORMALIZERS[normalizer],
        clamp=clamp, monomial=False, dropout=dropout,
    )  # fmt: skip
    fields: dict[str, Tensor | Refinement | None] = dict(zip(_MOMENTS, map(_plain, shift[1:]), strict=False))
    if moments is not None:
        fields |= {"mean": moments[0].contiguous(), "variance": moments[1].contiguous()}
    for name in ("first", "second")[: len(refinements) // _TENSORS]:
        *part, inner, width, steps = refinements[:_TENSORS]
        fields[name] = Refinement(_changed(part, heads).contiguous(), *map(_plain, (inner, width, steps)))
        refinements = refinements[_TENSORS:]
    return launch.forward(call, Shift(_plain(shift[0]), **fields))[0]


def looks_itself(query: Tensor, key: Tensor, mask: Tensor | None, ranges: Tensor | None, window: int | None) -> bool:
    """Whether the kernel finds the moments of rows by a look at their scores, and not sums over keys."""
    if key.shape[2] <= LONGEST_LOOK or window is not None or query.shape[2] <= launch.MOST_DECODED:
        return True
    return mask is not None or (ranges is not None and ranges.shape[1] > 1)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def _changed(parts: Sequence[Tensor], heads: int) -> Tensor:
    """Returns c + δA, (H, P + 1), as `patching.relative` computes it."""
    coefficients, delta, directions = (part.detach() for part in parts)
    return (coefficients + (delta.unsqueeze(-1) * directions).sum(-2)).expand(heads, -1)
