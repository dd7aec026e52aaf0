"""The centers of rows, by one fused kernel where there is one: of a call that nobody records, and its gradients.

The formula is that of `patching.row_shift`, which computes it in PyTorch everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import backends
from .checks import check_masks
from .modes import autocast_inputs, is_differentiated, is_plain, refuse_second_derivatives

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Beyond so many rows that see different keys, matrix products of whole chunks are faster than the kernel.
LONGEST = 512
_SHARING = 8  # rows a key head from which on the kernel has gradients: kSharing of csrc/shift.h


@dataclass(frozen=True, slots=True)
class MomentWeights:
    """What the moments of a row are weighed by; R squares, F = 8 + R features.

    Attributes:
        weights: (H, F), nats a unit of each feature.
        means: (H, F), of the features.
        length_shift: (H, D).
        squares: (H, R, D).
        lengths: the fewest and the most keys between which the count of a row is held.
        alpha: the row scale is n^(−alpha).
    """

    weights: Tensor
    means: Tensor
    length_shift: Tensor
    squares: Tensor
    lengths: tuple[float, float]
    alpha: float


def fused_centers(
    query: Tensor,
    key: Tensor,
    center: Tensor,
    key_shift: Tensor,
    parameters: Sequence[Tensor] = (),
    weigh: Callable[[], MomentWeights] | None = None,
    *,
    mask: Tensor | None,
    ranges: Tensor | None,
    causal: bool,
    window: int | None,
    scaling: float,
    backend: str,
) -> Tensor | None:
    """Returns the centers of all rows, (B, H, Tq), float32; None where no kernel has them, or PyTorch is faster.

    Args:
        query: (B, H, Tq, D).
        key: (B, G, Tk, D).
        center: (H,), float32.
        key_shift: (H, D), float32.
        parameters: of the moments.
        weigh: gives what the moments are weighed by; None for the key shift alone.
        mask, ranges, causal, window, scaling, backend: as of `polynomial_attention`.

    Raises:
        InputError: ranges that do not fit.
    """
    if mask is not None or not may_take_kernel(query, backend):
        return None
    query, key = autocast_inputs(query, key)
    tensors = (query, key, center, key_shift, *parameters)
    if not is_plain(*tensors) or not _fits(query, key, key_shift):
        return None
    differentiated = is_differentiated(*tensors)
    if differentiated and weigh is not None and query.shape[1] * query.shape[2] < _SHARING * key.shape[1]:
        return None
    if weigh is not None:
        if query.shape[2] > LONGEST and rows_differ(ranges, causal, window):
            return None
        check_masks(None, ranges, query, key.shape[2])
    if not backends.BACKENDS["cpu"].usable():
        return None
    moments = None if weigh is None else weigh()
    pattern = (ranges, causal, window, scaling)
    found: Tensor
    if differentiated:
        parts = (None,) * 3 if moments is None else (moments.weights, moments.length_shift, moments.squares)
        found = _Centers.apply(query, key, center, key_shift, *parts, moments, pattern)  # type: ignore[no-untyped-call]
    else:
        found = backends.BACKENDS["cpu"].load().row_centers(query, key, center, key_shift, moments, *pattern)
    return found


def may_take_kernel(query: Tensor, backend: str) -> bool:
    """Whether a call goes to the kernels of backend `cpu`, if they can be built."""
    return query.device.type == "cpu" and backend in ("auto", "cpu") and not backends.INTERPRETED


def rows_differ(ranges: Tensor | None, causal: bool, window: int | None) -> bool:
    """Whether query rows may see other keys than one another."""
    return causal or window is not None or (ranges is not None and ranges.shape[1] > 1)


class _Centers(torch.autograd.Function):
    """The centers of rows, with first derivatives."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Returns the centers; arguments are those of the kernel, and the parts of the moments apart, for autograd."""
        query, key, center, key_shift, weights, length_shift, squares, moments, pattern = arguments
        ctx.save_for_backward(query, key, center, key_shift, weights, length_shift, squares)
        ctx.moments, ctx.pattern = moments and replace(moments, weights=None, length_shift=None, squares=None), pattern
        found: Tensor = backends.BACKENDS["cpu"].load().row_centers(query, key, center, key_shift, moments, *pattern)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of query, key, center, key shift and the parts of the moments."""
        if torch.is_grad_enabled():
            refuse_second_derivatives()
        query, key, center, key_shift, *parts = ctx.saved_tensors
        moments = ctx.moments
        if moments is not None:
            moments = replace(moments, **dict(zip(("weights", "length_shift", "squares"), parts, strict=True)))
        kernels = backends.BACKENDS["cpu"].load()
        grads = kernels.row_centers_backward(grad, query, key, center, key_shift, moments, *ctx.pattern)
        return *grads, None, None


def _fits(query: Tensor, key: Tensor, key_shift: Tensor) -> bool:
    """Whether there is nothing that the operator will refuse, and explain."""
    if query.dtype not in DTYPES or query.dtype != key.dtype or not query.dim() == key.dim() == 4:
        return False
    same = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3] and query.shape[1::2] == key_shift.shape
    return same and key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0
