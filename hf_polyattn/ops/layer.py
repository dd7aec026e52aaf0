"""The whole forward pass of an attention module by one kernel, and its gradients by another, where nobody records it.

Each step through Python and PyTorch costs as much as the attention of a short sequence. The formula is that of
`patching.core` and `patching.row_shift`, which are taken everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .centers import DTYPES, LONGEST, may_take_kernel, rows_differ
from .checks import check_masks
from .dropout import new_seed
from .modes import autocast_inputs, is_differentiated, is_plain, refuse_second_derivatives

_KEPT = 1024  # keys of rows whose scores the kernel keeps: kKeptKeys of csrc/layer.h

#: The tensors of a polynomial, of the moments of a row shift and of a refinement, in the order of `csrc/layer.cpp`.
POLYNOMIAL = ("coefficients", "delta", "directions", "center", "radius")
MOMENTS = ("weights", "means", "scales", "length_shift", "squares", "lengths")
REFINEMENT = (*POLYNOMIAL, "steps")
#: Of a row shift.
SHIFT = ("key_shift", *MOMENTS)
_OWN = len(POLYNOMIAL)
_FIXED = 5  # arguments of `_Layer` before the tensors of the module
#: What can have a gradient, in the order in which the kernel gives them after those of query, key and value.
_TRAINED = ("delta", "center", "key_shift", "weights", "length_shift", "squares")


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
    dropout: float,
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
        mask, ranges, causal, window, scaling, power, clamp, dropout, backend: as of `polynomial_attention`.
        normalizer: its number in `spec.NORMALIZERS`.
        interval: whether the polynomial's center and radius count.
        alpha: the row scale is n^(−alpha); 0 for l1.

    Raises:
        InputError: a mask or ranges that do not fit.
    """
    if (mask is not None and (len(shift) > 1 or refinements)) or not may_take_kernel(query, backend):
        return None
    query, key, value = autocast_inputs(query, key, value)
    if not is_plain(query, key, value, *polynomial, *shift, *refinements) or not _fits(query, key, value):
        return None
    differentiated = is_differentiated(query, key, value, *polynomial, *shift, *refinements)
    q_len, k_len = query.shape[2], key.shape[2]
    if differentiated and (refinements or 0 in (*query.shape, *key.shape, *value.shape)):
        return None
    if not 0.0 <= dropout < 1.0:  # the operator says so
        return None
    if len(shift) > 1 and q_len > LONGEST and k_len > _KEPT and rows_differ(ranges, causal, window):
        return None
    if mask is not None or ranges is not None:
        check_masks(mask, ranges, query, k_len)
    if not backends.BACKENDS["cpu"].usable():
        return None
    seed = new_seed(query.device) if dropout > 0.0 else None
    pattern = (mask, ranges, seed, causal, window, scaling)
    settings = (power.bit_length() - 1, normalizer, clamp, interval, alpha, dropout)
    output: Tensor
    if differentiated:
        output = _Layer.apply(query, key, value, pattern, settings, *polynomial, *shift)  # type: ignore[no-untyped-call]
    else:
        output = torch.ops.polyattn_cpu.layer(query, key, value, polynomial, shift, refinements, *pattern, *settings)
    return output


class _Layer(torch.autograd.Function):
    """A module's output, with first derivatives."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Returns the output; arguments are query, key, value, pattern, settings, and the tensors of the module."""
        query, key, value, pattern, settings, *tensors = arguments
        mask, ranges, seed, *ctx.pattern = pattern
        output, row_scale, rows = torch.ops.polyattn_cpu.layer_forward(
            query, key, value, tensors[:_OWN], tensors[_OWN:], [], *pattern, *settings
        )
        ctx.save_for_backward(query, key, value, mask, ranges, seed, row_scale, rows, *tensors)
        ctx.settings = settings
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of query, key, value and the tensors of the module that can have one."""
        if torch.is_grad_enabled():
            refuse_second_derivatives()
        query, key, value, mask, ranges, seed, row_scale, rows, *tensors = ctx.saved_tensors
        wanted = dict(zip((*POLYNOMIAL, *SHIFT), ctx.needs_input_grad[_FIXED:], strict=False))
        found = torch.ops.polyattn_cpu.layer_backward(
            grad, row_scale, rows, wanted["delta"], any(wanted.get(name) for name in SHIFT), query, key, value,
            tensors[:_OWN], tensors[_OWN:], [], mask, ranges, seed, *ctx.pattern, *ctx.settings,
        )  # fmt: skip
        grads = {name: grad for name, grad in zip(_TRAINED, found[3:], strict=False) if grad.numel() > 0}
        return *found[:3], None, None, *(grads.get(name) if wants else None for name, wants in wanted.items())


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is nothing that the operator will refuse, and explain."""
    q, k, v = query.shape, key.shape, value.shape
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype or not len(q) == len(k) == len(v) == 4:
        return False
    if not query.device == key.device == value.device:
        return False
    return q[0] == k[0] and q[3] == k[3] > 0 and k[:3] == v[:3] and k[1] > 0 and q[1] % k[1] == 0
