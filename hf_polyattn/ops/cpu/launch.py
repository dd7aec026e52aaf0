"""Backend `cpu`: the fused C++ kernels of `csrc/`, for bf16, fp16 and fp32 on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...spec import NORMALIZERS
from ..call import Call
from ..centers import MomentWeights
from . import build


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Returns the output (B, Tq, H, Dv), contiguous, in the query's dtype, and the row scale as `library` says."""
    if call.is_empty:
        return call.zero_results()
    output, row_scale = _kernels().attention(*_arguments(call))
    return output, row_scale


def backward(
    grad_output: Tensor, output: Tensor, row_scale: Tensor, call: Call, *, coefficients_grad: bool, center_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key, value, coefficients and center (shape (0,) if there is none)."""
    if call.is_empty:
        return call.zero_gradients()
    moments = coefficients_grad and not (call.monomial and call.normalizer == "l1")  # c·t^P over its sum knows no c
    query, key, value, coefficients, center = _kernels().attention_backward(
        _rows(grad_output), row_scale, moments, *_arguments(call)
    )
    if call.center is not None:
        center = center.to(call.center.dtype)
    return query, key, value, coefficients.to(call.coefficients.dtype), center


def row_centers(
    query: Tensor, key: Tensor, center: Tensor, key_shift: Tensor, moments: MomentWeights | None, *pattern: Any
) -> Tensor:
    """Returns the centers of all rows, (B, H, Tq), float32; `pattern` is ranges, causal, window, scaling.

    See `ops.centers.fused_centers`.
    """
    found: Tensor = _kernels().row_centers(*_shift_arguments(query, key, center, key_shift, moments, *pattern))
    return found


def row_centers_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    center: Tensor,
    key_shift: Tensor,
    moments: MomentWeights | None,
    *pattern: Any,
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of query, key, center, key shift, and of the moments' weights, length shift and squares."""
    arguments = _shift_arguments(query, key, center, key_shift, moments, *pattern)
    of_query, of_key, *others = _kernels().row_centers_backward(grad.float().contiguous(), *arguments)
    if moments is None:  # the keys do not move their rows
        return of_query, None, *others[:2], None, None, None
    return of_query, of_key, *others


def _shift_arguments(
    query: Tensor,
    key: Tensor,
    center: Tensor,
    key_shift: Tensor,
    moments: MomentWeights | None,
    ranges: Tensor | None,
    causal: bool,
    window: int | None,
    scaling: float,
) -> tuple[Any, ...]:
    batch, _, q_len, _ = query.shape
    parts: tuple[Any, ...] = (None, None, None, None)
    limits: tuple[float, ...] = (0.0, 1.0, 1.0)
    if moments is not None:
        parts = (moments.weights, moments.means, moments.length_shift, moments.squares)
        parts = tuple(part.detach().contiguous() for part in parts)
        limits = (moments.alpha, *moments.lengths)
    ranges = None if ranges is None else ranges.to(torch.int32).expand(batch, q_len, -1)
    return (
        _rows(query.detach()), _rows(key.detach()), center.detach(), key_shift.detach().contiguous(), *parts, ranges,
        causal, window, scaling, *limits,
    )  # fmt: skip


def _kernels() -> Any:
    build.load()
    return torch.ops.polyattn_cpu


def _rows(tensor: Tensor) -> Tensor:
    """Returns a tensor whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float()


def _arguments(call: Call) -> tuple[Any, ...]:
    """Returns what the C++ operators take: the call, parameters in float32 and masks expanded to their full shapes."""
    batch, heads, q_len, _ = call.query.shape
    return (
        *(_rows(tensor.detach()) for tensor in (call.query, call.key, call.value)),
        call.coefficients.detach().float().contiguous(),
        _float(call.center),
        _float(call.radius),
        None if call.mask is None else call.mask.expand(batch, heads, q_len, -1),
        None if call.ranges is None else call.ranges.expand(batch, q_len, -1),
        call.seed,
        call.causal,
        call.window,
        call.scaling,
        call.power.bit_length() - 1,
        NORMALIZERS.index(call.normalizer),
        call.clamp,
        call.monomial,
        call.dropout,
    )
