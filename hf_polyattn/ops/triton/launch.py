"""Backend `triton`: fused GPU kernels, forward and backward. This module lays out a call and launches them.

Backward is deterministic: one kernel owns each dQ row, one each dK and dV row, and sums over blocks are added in a
fixed order. It computes the weights again from q, k and the row scale; nothing of the size Tq × Tk is stored.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..backends import INTERPRETED
from ..call import Call, empty_gradient
from . import forward as triton_forward
from .arguments import Dropout, Operand, Scores, Static, Visibility
from .backward_key_value import grad_key_value_kernel
from .backward_query import grad_query_kernel
from .delta import delta_kernel
from .tuning import Configuration, configuration, keys

_MAX_ROW_STRIDE = 2**31 // 512  # elements; no tile has more rows than 256
# In the interpreter, which has no device: small blocks, so that short sequences cross block boundaries.
_INTERPRETED_CONFIGURATION = Configuration(block_m=16, block_n=16, num_warps=4, num_stages=1)
_INTERPRETED_PROCESSORS = 4
# A monomial of a higher degree is computed of the scaled score: q·k to that degree may overflow.
_MAX_FOLDED_DEGREE = 4
# Rows of a decode tile, at most: the query heads of a group times their queries.
_MAX_DECODE_ROWS = 64
_MAX_DECODE_QUERIES = 16


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Returns the output (B, Tq, H, Dv), contiguous, in the query's dtype, and the row scale as `library` says."""
    if call.is_empty:
        return call.zero_results()
    batch, heads, q_len, _ = call.query.shape
    k_len = call.key.shape[2]
    out = call.query.new_empty((batch, q_len, heads, call.value.shape[3]))
    l1 = call.normalizer == "l1"
    row_scale = call.query.new_empty((batch, heads, q_len) if l1 else (0,), dtype=torch.float32)
    repeats = heads // call.key.shape[1]
    if repeats * q_len <= _MAX_DECODE_ROWS and q_len <= _MAX_DECODE_QUERIES and k_len >= 16 * q_len:
        _decode(call, out, row_scale)
        return out, row_scale

    tuned = _configuration("forward", call)
    static = _static(call, tuned)
    scales = row_scale if l1 else _counted_scale(call, static, tuned)
    _launch(
        triton_forward.forward_kernel, _blocks(q_len, static.block_m) * heads * batch, call, tuned,
        _operand(call.query), _operand(call.key), _operand(call.value), _operand(out.transpose(1, 2)), scales,
        _scores(call), _visibility(call), _dropout(call), heads, repeats, S=static,
    )  # fmt: skip
    return out, row_scale


def backward(
    grad_output: Tensor,
    output: Tensor,
    row_scale: Tensor,
    call: Call,
    *,
    coefficients_grad: bool,
    center_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key, value, coefficients and center, as `library` says."""
    if call.is_empty:
        return call.zero_gradients()
    center_grad = center_grad and call.center is not None
    batch, heads, q_len, _ = call.query.shape
    groups, k_len = call.key.shape[1:3]
    grad_query, grad_key, grad_value = (empty_gradient(operand) for operand in (call.query, call.key, call.value))
    grad_coefficients = torch.zeros_like(call.coefficients, memory_format=torch.contiguous_format)
    grad_center = grad_coefficients.new_zeros((0,) if call.center is None else call.center.shape, dtype=torch.float32)
    center_dtype = call.coefficients.dtype if call.center is None else call.center.dtype

    tuned = _configuration("grad_query", call)
    static = _static(call, tuned)
    programs = _blocks(q_len, static.block_m) * heads * batch
    query, key, value = (_operand(tensor) for tensor in (call.query, call.key, call.value))
    rows = _operand(grad_output.transpose(1, 2))
    shared = (_scores(call), _visibility(call), _dropout(call), heads, heads // groups)
    delta, scales = None, _counted_scale(call, static, tuned)
    if call.normalizer == "l1":
        delta, scales = torch.empty_like(row_scale), row_scale
        _launch(
            delta_kernel, programs, call, tuned,
            query, key, value, rows, _operand(output.transpose(1, 2)), delta, scales, *shared,
            EXACT=coefficients_grad or center_grad, S=static,
        )  # fmt: skip
    moment_count = 1 if call.monomial else static.degree + 1
    moments = grad_center.new_empty((batch, heads, _blocks(q_len, static.block_m), moment_count))
    _launch(
        grad_query_kernel, programs, call, tuned,
        query, key, value, rows, _operand(grad_query), scales, delta, moments, grad_center, *shared,
        MOMENTS=coefficients_grad, SHIFT=center_grad, S=static,
    )  # fmt: skip
    if coefficients_grad:
        grad_coefficients[:, -moments.shape[-1] :] = moments.sum((0, 2))

    tuned = _configuration("grad_key_value", call)
    static = _static(call, tuned)
    _launch(
        grad_key_value_kernel, _blocks(k_len, static.block_n) * groups * batch, call, tuned,
        query, key, value, rows, _operand(grad_key), _operand(grad_value), scales, delta, *shared, S=static,
    )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_coefficients, grad_center.to(center_dtype)


def _decode(call: Call, out: Tensor, row_scale: Tensor) -> None:
    """Few queries against many keys: parts of the keys side by side, then their sums in order."""
    batch, heads, q_len, _ = call.query.shape
    groups, k_len = call.key.shape[1:3]
    repeats = heads // groups
    tuned = _configuration("decode", call)
    tuned = tuned._replace(block_m=max(16, _power_of_two(repeats * q_len)))
    static = _static(call, tuned)
    processors = _INTERPRETED_PROCESSORS
    if call.query.is_cuda:
        processors = torch.cuda.get_device_properties(call.query.device).multi_processor_count
    wanted = max(1, min(_blocks(k_len, 2 * static.block_n), 2 * processors // (batch * groups)))
    split_keys = _blocks(_blocks(k_len, wanted), static.block_n) * static.block_n
    splits = _blocks(k_len, split_keys)
    totals = row_scale.new_empty((batch, groups, splits, static.block_m))
    partial = row_scale.new_empty((*totals.shape, static.value_dim))
    _launch(
        triton_forward.decode_kernel, splits * groups * batch, call, tuned,
        _operand(call.query), _operand(call.key), _operand(call.value), partial, totals, _scores(call),
        _visibility(call), _dropout(call), heads, repeats, split_keys, splits, S=static,
    )  # fmt: skip
    _launch(
        triton_forward.decode_sum_kernel, q_len * heads * batch, call, Configuration(1, 1, 1, 1),
        partial, totals, _operand(out.transpose(1, 2)), row_scale, q_len, heads, repeats, splits, S=static,
    )  # fmt: skip


def _counted_scale(call: Call, static: Static, tuned: Configuration) -> Tensor | None:
    """Returns r_i (B, H, Tq) where visible keys must be counted, under a dense mask without l1; else None."""
    if call.mask is None or call.normalizer == "l1":
        return None
    batch, heads, q_len, _ = call.query.shape
    row_scale = call.query.new_empty((batch, heads, q_len), dtype=torch.float32)
    _launch(
        triton_forward.count_kernel, _blocks(q_len, static.block_m) * heads * batch, call, tuned,
        row_scale, _visibility(call), heads, S=static,
    )  # fmt: skip
    return row_scale


def _launch(kernel: Any, programs: int, call: Call, tuned: Configuration, *arguments: Any, **static: Any) -> None:
    with torch.cuda.device(call.query.device) if call.query.is_cuda else nullcontext():
        kernel[(programs,)](*arguments, **static, **compile_options(tuned))


def compile_options(tuned: Configuration) -> dict[str, Any]:
    """Returns what Triton's compiler is told beside the arguments. Its default for fused multiply-adds varies."""
    options = {"num_warps": tuned.num_warps, "num_stages": tuned.num_stages, "enable_fp_fusion": True}
    return options if tuned.max_registers is None else options | {"maxnreg": tuned.max_registers}


def _configuration(kernel: str, call: Call) -> Configuration:
    if INTERPRETED:
        return _INTERPRETED_CONFIGURATION
    return configuration(kernel, table_keys(call), call.query.device)


def table_keys(call: Call) -> tuple[str, ...]:
    """Returns the keys of a tuning table that fit a call, the best first."""
    width = max(call.query.shape[3], call.value.shape[3])
    return keys(call.query.dtype, width, call.monomial, call.query.shape[1] > call.key.shape[1])


def _static(call: Call, tuned: Configuration) -> Static:
    head_dim, value_dim = call.query.shape[3], call.value.shape[3]
    degree = call.coefficients.shape[1] - 1
    bare = call.monomial and call.power == 1 and call.center is None and not call.clamp
    ranged = 0 if call.ranges is None else 1 if call.ranges.shape[1] == 1 else 2
    return Static(
        degree=degree,
        squarings=call.power.bit_length() - 1,
        normalizer=call.normalizer,
        monomial=call.monomial,
        fold=bare and degree <= _MAX_FOLDED_DEGREE,
        clamp=call.clamp,
        causal=call.causal,
        ranged=ranged,
        q_even=call.query.shape[2] % tuned.block_m == 0,
        k_even=call.key.shape[2] % tuned.block_n == 0,
        scaled=call.query.dtype == torch.float16,
        precision="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        head_dim=head_dim,
        value_dim=value_dim,
        block_m=tuned.block_m,
        block_n=tuned.block_n,
    )


def _operand(tensor: Tensor) -> Operand:
    """Returns a tensor (B, H, T, columns) with contiguous columns, whose tiles have 32-bit offsets; else a copy."""
    if tensor.stride(3) != 1 or tensor.stride(2) > _MAX_ROW_STRIDE:
        tensor = tensor.contiguous()
    return Operand(tensor, *tensor.stride()[:3])


def _scores(call: Call) -> Scores:
    center_strides = _broadcast_strides(call.center, 3)
    radius_stride = 0 if call.radius is None else call.radius.stride(0)
    coefficients = (call.coefficients, *call.coefficients.stride())
    fields: tuple[Any, ...] = (*coefficients, call.radius, radius_stride, call.center, *center_strides, call.scaling)
    return Scores(*fields)


def _visibility(call: Call) -> Visibility:
    q_len, k_len = call.query.shape[2], call.key.shape[2]
    mask = None if call.mask is None else call.mask.view(torch.uint8)
    range_strides, mask_strides = _broadcast_strides(call.ranges, 3), _broadcast_strides(mask, 4)
    fields: tuple[Any, ...] = (q_len, k_len, call.window, call.ranges, *range_strides, mask, *mask_strides)
    return Visibility(*fields)


def _broadcast_strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    if tensor is None:
        return (0,) * dims
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _dropout(call: Call) -> Dropout | None:
    if call.seed is None:
        return None
    return Dropout(call.seed, int(call.dropout * 2**32) - 2**31, 1.0 / (1.0 - call.dropout))


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
