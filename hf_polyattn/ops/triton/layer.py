"""A whole attention module by the Triton kernels, without gradients: polynomial, row shift, refinements, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...spec import NORMALIZERS
from ..call import Call
from ..module import MOMENTS, REFINEMENT, ModuleTensors, changed_coefficients
from . import launch
from .arguments import Refinement, Shift

#: For rows of at most so many keys the kernel finds the moments itself, by one look more; beyond, sums over the keys.
LONGEST_LOOK = 1024


def layer(
    tensors: ModuleTensors,
    moments: tuple[Tensor, Tensor] | None,
    pattern: Sequence[Any],
    settings: Sequence[Any],
) -> Tensor:
    """Returns the output (B, Tq, H, Dv).

    Args:
        tensors: of the module; there is a shift.
        moments: mean and variance of the scores of each row, (B, H, Tq); None where the kernel finds them.
        pattern: mask, ranges, seed, causal, window, scaling.
        settings: log2 of the power, number of the normalizer, clamp, interval, α, dropout.
    """
    query, key, value, polynomial, shift, refinements = tensors
    mask, ranges, seed, causal, window, scaling = pattern
    squarings, normalizer, clamp, interval, _, dropout = settings
    batch, heads, q_len, _ = query.shape
    *changing, center, radius = (tensor.detach() for tensor in polynomial)
    call = Call(
        query=query, key=key, value=value, coefficients=_changed(changing, heads), mask=mask, ranges=ranges,
        center=center[None, :, None].expand(batch, heads, q_len), radius=radius if interval else None, seed=seed,
        causal=causal, window=window, scaling=scaling, power=1 << squarings, normalizer=NORMALIZERS[normalizer],
        clamp=clamp, monomial=False, dropout=dropout,
    )  # fmt: skip
    fields: dict[str, Tensor | Refinement | None] = dict(zip(MOMENTS, map(_plain, shift[1:]), strict=False))
    if moments is not None:
        fields |= {"mean": moments[0].contiguous(), "variance": moments[1].contiguous()}
    for name, at in zip(("first", "second"), range(0, len(refinements), len(REFINEMENT)), strict=False):
        *changing, inner, width, steps = map(_plain, refinements[at : at + len(REFINEMENT)])
        fields[name] = Refinement(_changed(changing, heads).contiguous(), inner, width, steps)
    return launch.forward(call, Shift(_plain(shift[0]), **fields))[0]


def looks_itself(query: Tensor, key: Tensor, mask: Tensor | None, ranges: Tensor | None, window: int | None) -> bool:
    """Whether the kernel finds the moments of rows by a look at their scores, and not sums over keys."""
    if key.shape[2] <= LONGEST_LOOK or window is not None or query.shape[2] <= launch.MOST_DECODED:
        return True
    return mask is not None or (ranges is not None and ranges.shape[1] > 1)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def _changed(parts: Sequence[Tensor], heads: int) -> Tensor:
    """Returns c + δA of each head."""
    return changed_coefficients(*parts).expand(heads, -1)
