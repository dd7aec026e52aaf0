"""The whole forward pass of an attention module by one kernel, where nobody records it, and its gradients by another.

Each step through Python and PyTorch costs as much as the attention of a short sequence. The formula is that of
`patching.core` and `patching.row_shift`, which are taken everywhere else: on a GPU for gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import NORMALIZERS
from . import backends
from .centers import DTYPES, LONGEST, may_take_kernel, rows_differ
from .checks import check_masks
from .dropout import new_seed
from .modes import autocast_inputs, is_differentiated, is_plain, refuse_second_derivatives
from .module import POLYNOMIAL, SHIFT, ModuleTensors
from .moments import score_moments

_KEPT = 1024  # keys of rows whose scores the kernel keeps: kKeptKeys of csrc/layer.h

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
    triton = _may_take_triton(query, backend) and len(shift) > 0
    if not triton and not may_take_kernel(query, backend):
        return None
    query, key, value = autocast_inputs(query, key, value)
    if not is_plain(query, key, value, *polynomial, *shift, *refinements) or not _fits(query, key, value):
        return None
    if not 0.0 <= dropout < 1.0 or (window is not None and window < 1):  # the operator says so
        return None
    differentiated = is_differentiated(query, key, value, *polynomial, *shift, *refinements)
    tensors = ModuleTensors(query, key, value, polynomial, shift, refinements)
    pattern = (mask, ranges, causal, window, scaling)
    settings = (power.bit_length() - 1, normalizer, clamp, interval, alpha, dropout)
    if triton:
        return _take_triton(tensors, differentiated, pattern, settings, backend)
    return _take_cpu(tensors, differentiated, pattern, settings)


def _take_cpu(
    tensors: ModuleTensors, differentiated: bool, pattern: Sequence[Any], settings: Sequence[Any]
) -> Tensor | None:
    """Returns the output by the kernels of backend `cpu`, see `fused_layer`."""
    query, key, value, polynomial, shift, refinements = tensors
    mask, ranges, causal, window, _ = pattern
    q_len, k_len = query.shape[2], key.shape[2]
    if mask is not None and (len(shift) > 1 or refinements):
        return None
    if differentiated and (refinements or 0 in (*query.shape, *key.shape, *value.shape)):
        return None
    if len(shift) > 1 and q_len > LONGEST and k_len > _KEPT and rows_differ(ranges, causal, window):
        return None
    if mask is not None or ranges is not None:
        check_masks(mask, ranges, query, k_len)
    if not backends.BACKENDS["cpu"].usable():
        return None
    seeded = _seeded(pattern, query, settings)
    output: Tensor
    if differentiated:
        output = _Layer.apply(query, key, value, seeded, settings, *polynomial, *shift)  # type: ignore[no-untyped-call]
    else:
        output = torch.ops.polyattn_cpu.layer(query, key, value, polynomial, shift, refinements, *seeded, *settings)
    return output


def _may_take_triton(query: Tensor, backend: str) -> bool:
    """Whether a call goes to backend `triton`, if it can run it."""
    return backend in ("auto", "triton") and query.device.type == ("cpu" if backends.INTERPRETED else "cuda")


def _take_triton(
    tensors: ModuleTensors, differentiated: bool, pattern: Sequence[Any], settings: Sequence[Any], backend: str
) -> Tensor | None:
    """Returns the output by the kernels of backend `triton`, see `fused_layer`."""
    query, key, value, _, shift, _ = tensors
    if differentiated or 0 in (*query.shape, *key.shape, *value.shape):
        return None
    mask, ranges, causal, window, scaling = pattern
    check_masks(mask, ranges, query, key.shape[2])
    problem = backends.Problem(
        device=query.device.type, dtype=query.dtype, normalizer=NORMALIZERS[settings[1]], power=1 << settings[0],
        return_weights=False, radius_grad=False, head_dim=query.shape[3], value_dim=value.shape[3],
    )  # fmt: skip
    if backends.select(backend, problem) != "triton":
        return None
    from .triton import layer as kernels

    moments = None
    if len(shift) > 1 and not kernels.looks_itself(query, key, mask, ranges, window):
        pattern_of_rows = {"mask": mask, "ranges": ranges, "causal": causal, "window": window}
        moments = score_moments(query, key, scaling=scaling, backend=backend, **pattern_of_rows)
    ranges = None if ranges is None else ranges.to(torch.int32)
    seeded = _seeded((mask, ranges, causal, window, scaling), query, settings)
    return kernels.layer(tensors, moments, seeded, settings)


def _seeded(pattern: Sequence[Any], query: Tensor, settings: Sequence[Any]) -> tuple[Any, ...]:
    """Returns a pattern with the seed of its dropout, as kernels take it."""
    mask, ranges, *others = pattern
    return mask, ranges, new_seed(query.device) if settings[-1] > 0.0 else None, *others


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
