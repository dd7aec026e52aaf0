"""The whole forward pass of an attention module by one kernel, where nobody differentiates or records it.

Each step through Python and PyTorch costs as much as the attention of a short sequence. The formula is that of
`patching.core` and `patching.row_shift`, which are taken everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .centers import DTYPES, LONGEST, may_take_kernel, rows_differ
from .checks import check_masks
from .modes import autocast_inputs, runs_at_once

_KEPT = 1024  # keys of rows whose scores the kernel keeps: kKeptKeys of csrc/layer.h

#: The tensors of a polynomial, of the moments of a row shift and of a refinement, in the order of `csrc/layer.cpp`.
POLYNOMIAL = ("coefficients", "delta", "directions", "center", "radius")
MOMENTS = ("weights", "means", "scales", "length_shift", "squares", "lengths")
REFINEMENT = (*POLYNOMIAL, "steps")


def fused_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    polynomial: Sequence[Tensor],
    shift: Sequence[Tensor],
    refinements: Sequence[Tensor],
    *,
    mask: Tensor | None,
    ranges: Tensor | None,
    causal: bool,
    window: int | None,
    scaling: float,
    power: int,
    normalizer: int,
    clamp: bool,
    interval: bool,
    alpha: float,
    backend: str,
) -> Tensor | None:
    """Returns the output (B, Tq, H, Dv) of an attention module; None where no kernel has it, or PyTorch is faster.

    Args:
        query: (B, H, Tq, D).
        key: (B, G, Tk, D).
        value: (B, G, Tk, Dv).
        polynomial: the tensors of POLYNOMIAL.
        shift: nothing; the key shift (H, D); or that and the tensors of MOMENTS.
        refinements: the tensors of REFINEMENT, of one after the other.
        mask, ranges, causal, window, scaling, power, clamp, backend: as of `polynomial_attention`.
        normalizer: its number in `spec.NORMALIZERS`.
        interval: whether the polynomial's center and radius count.
        alpha: the row scale is n^(−alpha); 0 for l1.

    Raises:
        InputError: a mask or ranges that do not fit.
    """
    if (shift and mask is not None) or not may_take_kernel(query, backend):
        return None
    query, key, value = autocast_inputs(query, key, value)
    if not runs_at_once(query, key, value, *polynomial, *shift, *refinements) or not _fits(query, key, value):
        return None
    q_len, k_len = query.shape[2], key.shape[2]
    if len(shift) > 1 and q_len > LONGEST and k_len > _KEPT and rows_differ(ranges, causal, window):
        return None
    if mask is not None or ranges is not None:
        check_masks(mask, ranges, query, k_len)
    if not backends.BACKENDS["cpu"].usable():
        return None
    output: Tensor = torch.ops.polyattn_cpu.layer(
        query, key, value, polynomial, shift, refinements, mask, ranges, causal, window, scaling,
        power.bit_length() - 1, normalizer, clamp, interval, alpha,
    )  # fmt: skip
    return output


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is nothing that the operator will refuse, and explain."""
    q, k, v = query.shape, key.shape, value.shape
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype or not len(q) == len(k) == len(v) == 4:
        return False
    if not query.device == key.device == value.device:
        return False
    return q[0] == k[0] and q[3] == k[3] > 0 and k[:3] == v[:3] and k[1] > 0 and q[1] % k[1] == 0
