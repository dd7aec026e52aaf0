"""Backend `triton`: fused GPU kernels, forward and backward. This module lays out a call and launches them.

Backward is deterministic: one kernel owns each dQ row, one each dK and dV row, and sums over blocks are added in a
fixed order. It computes the weights again from q, k and the row scale; nothing of the size Tq × Tk is stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..call import Call, empty_gradient
from . import decode, layout
from .arguments import Shift, Static
from .backward_key_value import grad_key_value_kernel
from .backward_query import grad_query_kernel
from .delta import delta_kernel
from .forward import count_kernel, forward_kernel
from .tuning import Configuration

_INTERPRETED_PROCESSORS = 4
_ONE_ROW = Configuration(1, 1, 1, 1)
# Rows of a decode tile, at most: the query heads of a group times their queries.
_MAX_DECODE_ROWS = 64
MOST_DECODED = 16


def forward(call: Call, shift: Shift | None = None) -> tuple[Tensor, Tensor]:
    """Returns the output (B, Tq, H, Dv), contiguous, in the query's dtype, and the row scale as `library` says.

    Args:
        call: with a shift its center is that of each head, expanded.
        shift: what the kernel adds to the center of each row.
    """
    if call.is_empty:
        return call.zero_results()
    batch, heads, q_len, _ = call.query.shape
    out = call.query.new_empty((batch, q_len, heads, call.value.shape[3]))
    l1 = call.normalizer == "l1"
    row_scale = call.query.new_empty((batch, heads, q_len) if l1 else (0,), dtype=torch.float32)
    if is_decode(call):
        _decode(call, out, row_scale, shift)
        return out, row_scale

    tuned = layout.configuration_of("forward", call)
    static = layout.static_of(call, tuned)
    scales = row_scale if l1 else None if shift is not None else _counted_scale(call, static, tuned)
    operands = (call.query, call.key, call.value, out.transpose(1, 2))
    layout.launch(
        forward_kernel, layout.blocks(q_len, static.block_m) * heads * batch, call, tuned,
        *map(layout.operand_of, operands), scales, layout.scores_of(call), layout.visibility_of(call),
        layout.dropout_of(call), shift, heads, heads // call.key.shape[1], SHIFTED=shift is not None,
        SQUARES=squares_of(shift), S=static,
    )  # fmt: skip
    return out, row_scale


def is_decode(call: Call) -> bool:
    """Whether parts of the keys run side by side: few queries against many keys."""
    (_, heads, q_len, _), (_, groups, k_len, _) = call.query.shape, call.key.shape
    rows = heads // groups * q_len
    return rows <= _MAX_DECODE_ROWS and q_len <= MOST_DECODED and k_len >= 16 * q_len


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

    tuned = layout.configuration_of("grad_query", call)
    static = layout.static_of(call, tuned)
    programs = layout.blocks(q_len, static.block_m) * heads * batch
    query, key, value = (layout.operand_of(tensor) for tensor in (call.query, call.key, call.value))
    rows = layout.operand_of(grad_output.transpose(1, 2))
    shared = (layout.scores_of(call), layout.visibility_of(call), layout.dropout_of(call), heads, heads // groups)
    delta, scales = None, _counted_scale(call, static, tuned)
    if call.normalizer == "l1":
        delta, scales = torch.empty_like(row_scale), row_scale
        layout.launch(
            delta_kernel, programs, call, tuned,
            query, key, value, rows, layout.operand_of(output.transpose(1, 2)), delta, scales, *shared,
            EXACT=coefficients_grad or center_grad, S=static,
        )  # fmt: skip
    moment_count = 1 if call.monomial else static.degree + 1
    moments = grad_center.new_empty((batch, heads, layout.blocks(q_len, static.block_m), moment_count))
    layout.launch(
        grad_query_kernel, programs, call, tuned,
        query, key, value, rows, layout.operand_of(grad_query), scales, delta, moments, grad_center, *shared,
        MOMENTS=coefficients_grad, SHIFT=center_grad, S=static,
    )  # fmt: skip
    if coefficients_grad:
        grad_coefficients[:, -moments.shape[-1] :] = moments.sum((0, 2))

    tuned = layout.configuration_of("grad_key_value", call)
    static = layout.static_of(call, tuned)
    layout.launch(
        grad_key_value_kernel, layout.blocks(k_len, static.block_n) * groups * batch, call, tuned,
        query, key, value, rows, layout.operand_of(grad_key), layout.operand_of(grad_value), scales, delta, *shared,
        S=static,
    )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_coefficients, grad_center.to(center_dtype)


def _decode(call: Call, out: Tensor, row_scale: Tensor, shift: Shift | None) -> None:
    """Few queries against many keys: parts of the keys side by side, then their sums in order."""
    batch, heads, q_len, _ = call.query.shape
    groups, k_len = call.key.shape[1:3]
    tuned = layout.configuration_of("decode", call)
    tuned = tuned._replace(block_m=max(16, layout.power_of_two(heads // groups * q_len)))
    static = layout.static_of(call, tuned)
    processors = _INTERPRETED_PROCESSORS
    if call.query.is_cuda:
        processors = torch.cuda.get_device_properties(call.query.device).multi_processor_count
    wanted = max(1, min(layout.blocks(k_len, 2 * static.block_n), 2 * processors // (batch * groups)))
    split_keys = layout.blocks(layout.blocks(k_len, wanted), static.block_n) * static.block_n
    splits = layout.blocks(k_len, split_keys)
    left: tuple[Any, ...] = (layout.operand_of(call.query), layout.operand_of(call.key))
    products = None
    if shift is not None:
        products, centers = _decode_centers(call, shift, tuned, static, split_keys, splits)
        left, call = (None, None), replace(call, center=centers)
    totals = row_scale.new_empty((batch, groups, splits, static.block_m))
    partial = row_scale.new_empty((*totals.shape, static.value_dim))
    layout.launch(
        decode.decode_kernel, splits * groups * batch, call, tuned,
        *left, layout.operand_of(call.value), products, partial, totals, layout.scores_of(call),
        layout.visibility_of(call), layout.dropout_of(call), heads, heads // groups, split_keys, splits, S=static,
    )  # fmt: skip
    layout.launch(
        decode.decode_sum_kernel, q_len * heads * batch, call, _ONE_ROW,
        partial, totals, layout.operand_of(out.transpose(1, 2)), row_scale, q_len, heads, heads // groups, splits,
        S=static,
    )  # fmt: skip


def _decode_centers(
    call: Call, shift: Shift, tuned: Configuration, static: Static, split_keys: int, splits: int
) -> tuple[Tensor, Tensor]:
    """Returns the products q·k, (B, H, Tq, Tk), those that a row sees, and the centers of the rows, (B, H, Tq)."""
    batch, heads, q_len, _ = call.query.shape
    groups, k_len = call.key.shape[1:3]
    repeats = heads // groups
    products = call.query.new_empty((batch, heads, q_len, k_len), dtype=torch.float32)
    centers, counts = products.new_empty((2, batch, heads, q_len)).unbind()
    parts = products.new_empty((batch, groups, splits, 3, static.block_m))
    query, scores, visibility = layout.operand_of(call.query), layout.scores_of(call), layout.visibility_of(call)
    part, rows = (heads, repeats, split_keys, splits), (q_len, heads, repeats, splits)
    by_row = {"SPLITS": layout.power_of_two(splits), "S": static}
    layout.launch(
        decode.products_kernel, splits * groups * batch, call, tuned,
        query, layout.operand_of(call.key), products, parts, visibility, *part, S=static,
    )  # fmt: skip
    layout.launch(
        decode.predict_kernel, q_len * heads * batch, call, _ONE_ROW,
        query, parts, centers, counts, scores, shift, *rows, SQUARES=squares_of(shift), **by_row,
    )  # fmt: skip
    for refinement in (shift.first, shift.second):
        if refinement is not None:
            layout.launch(
                decode.row_sum_kernel, splits * groups * batch, call, tuned,
                products, centers, parts, refinement, scores, visibility, *part, S=static,
            )  # fmt: skip
            layout.launch(
                decode.step_kernel, q_len * heads * batch, call, _ONE_ROW,
                parts, centers, counts, refinement, *rows, **by_row,
            )  # fmt: skip
    return products, centers


def squares_of(shift: Shift | None) -> int:
    """Returns how many squares of linear forms of the query a shift has."""
    return 0 if shift is None or shift.squares is None else shift.squares.shape[1]


def _counted_scale(call: Call, static: Static, tuned: Configuration) -> Tensor | None:
    """Returns r_i (B, H, Tq) where visible keys must be counted, under a dense mask without l1; else None."""
    if call.mask is None or call.normalizer == "l1":
        return None
    batch, heads, q_len, _ = call.query.shape
    row_scale = call.query.new_empty((batch, heads, q_len), dtype=torch.float32)
    layout.launch(
        count_kernel, layout.blocks(q_len, static.block_m) * heads * batch, call, tuned,
        row_scale, layout.visibility_of(call), heads, S=static,
    )  # fmt: skip
    return row_scale
