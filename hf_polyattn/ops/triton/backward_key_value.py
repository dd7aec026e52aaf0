"""The backward kernel of backend `triton` whose programs own keys: dK and dV."""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import drop, hash_rows, keep_scale_of
from .loops import locate_program, visit_blocks
from .polynomial import (
    compute_derivatives,
    compute_factor,
    compute_t,
    load_offset,
    load_polynomial,
    scale_slopes,
    subtract_delta,
)
from .tiles import accumulate, finish_rows, load_rows, locate, multiply_transposed, new_sums, store_rows, zero_rows
from .visibility import find_interval, find_visible, locate_mask_rows, scale_by_interval


@triton.jit
def _query_blocks(visibility, entry, first_key, last_key, S: tl.constexpr):
    """Returns the query rows that see a key of first..last, [begin, end), and blocks whose rows see all of them."""
    begin = first_key * 0
    end = begin + visibility.q_len
    whole = begin
    stop = end
    if S.causal:
        begin = first_key
        whole = last_key
    if visibility.window is not None:
        begin = tl.maximum(begin, first_key - visibility.window + 1)
        end = tl.minimum(end, last_key + visibility.window)
        whole = tl.maximum(whole, last_key - visibility.window + 1)
        stop = tl.minimum(stop, first_key + visibility.window)
    if S.ranged == 1:
        pointer = visibility.ranges + entry.to(tl.int64) * visibility.range_batch
        low = tl.load(pointer)
        high = tl.load(pointer + visibility.range_bound)
        end = tl.where((low <= last_key) & (high > first_key), end, begin)
        stop = tl.where((low <= first_key) & (high > last_key), stop, whole)
    if S.ranged == 2:  # no order is promised: look at every row
        seen_first = end
        seen_last = begin - 1
        for start in tl.range(begin // S.block_m * S.block_m, end, 1024):
            rows = tl.minimum(start + tl.arange(0, 1024), visibility.q_len - 1)
            low, high = find_interval(visibility, entry, rows, S)
            seen = tl.maximum(low, first_key) <= tl.minimum(high - 1, last_key)
            seen_first = tl.minimum(seen_first, tl.min(tl.where(seen, rows, visibility.q_len), 0))
            seen_last = tl.maximum(seen_last, tl.max(tl.where(seen, rows, -1), 0))
        begin = tl.maximum(begin, seen_first)
        end = tl.minimum(end, seen_last + 1)
        stop = whole
    if visibility.mask is not None:
        stop = whole

    begin = tl.minimum(begin, end) // S.block_m * S.block_m
    whole = tl.cdiv(whole, S.block_m) * S.block_m
    whole = tl.maximum(tl.minimum(whole, tl.cdiv(end, S.block_m) * S.block_m), begin)
    last_block = tl.cdiv(visibility.q_len, S.block_m) * S.block_m
    stop = tl.where(stop >= visibility.q_len, last_block, stop // S.block_m * S.block_m)
    stop = tl.maximum(tl.minimum(stop, tl.cdiv(end, S.block_m) * S.block_m), whole)
    return begin, end, whole, stop


@triton.jit
def _grad_key_value_block(state, start, operands, MASKED: tl.constexpr, S: tl.constexpr):
    """Adds the query rows start..start + block_m of one head to the sums of dS·q and r w·dO."""
    key_sums, value_sums = state
    keys, queries, polynomial, program, scores, visibility, dropout = operands
    k, v, first_key = keys
    query, grad_out, row_scale, delta, place = queries
    c, inverse_radius, a, slopes = polynomial
    entry, head, heads = program
    q = load_rows(query[0], query[1], start, visibility.q_len, S.block_m, S.head_dim, S.q_even)
    do = load_rows(grad_out[0], grad_out[1], start, visibility.q_len, S.block_m, S.value_dim, S.q_even)
    rows = tl.minimum(start + tl.arange(0, S.block_m), visibility.q_len - 1)
    columns = (first_key + tl.arange(0, S.block_n))[:, None]
    low, high = find_interval(visibility, entry, rows, S)
    b = load_offset(scores, entry, head, rows, inverse_radius)[None, :]
    if S.normalizer == "l1" or visibility.mask is not None:
        scale = tl.load(row_scale + place + rows)
    else:
        scale = scale_by_interval(low, high, S)
    scale = (scale * keep_scale_of(dropout))[None, :]
    row_delta = scale
    if S.normalizer == "l1":
        row_delta = tl.load(delta + place + rows)[None, :]

    t = compute_t(multiply_transposed(k, q, S), a, b, scores, S)
    if MASKED:
        mask_rows = locate_mask_rows(visibility, entry, head, rows)[None, :]
        visible = find_visible(low[None, :], high[None, :], mask_rows, columns, visibility)
        t = tl.where(visible, t, 0.0)
    w, outer, slope = compute_derivatives(t, c, slopes, S)
    if S.squarings > 0:
        slope *= outer
    if S.clamp:
        slope = tl.where(tl.abs(t) < 1.0, slope, 0.0)
    if MASKED:
        w = tl.where(visible, w, 0.0)
        slope = tl.where(visible, slope, 0.0)
    if S.fold:  # r c a^P goes with x^(P−1), which makes both w and dt; P remains for the end
        slope *= scale * compute_factor(c, a, S)
        weights = slope * t
    elif S.monomial:
        slope *= scale * slopes[0]
        weights = w * (scale * compute_factor(c, a, S))
    else:
        slope *= scale
        weights = w * scale
    words = hash_rows(dropout, visibility, entry, head, heads, rows)[None, :]
    value_sums = accumulate(value_sums, drop(weights, words, columns, dropout), do, S)

    # Only now, so that fewer tiles are alive at a time.
    dw = multiply_transposed(v, do, S)
    dt = subtract_delta(drop(dw, words, columns, dropout), w, row_delta, S) * slope
    key_sums = accumulate(key_sums, dt, q, S)
    return key_sums, value_sums


@triton.jit
def grad_key_value_kernel(
    query, key, value, grad_out, grad_key, grad_value, row_scale, delta, scores, visibility, dropout, heads, repeats,
    S: tl.constexpr,
):  # fmt: skip
    """Computes dK and dV of block_n keys of one key head, over the query heads that share it, in order.

    Grid: blocks of keys × key heads × batch, in one dimension. Tiles are transposed: rows are keys, so that no
    product needs the transpose of a computed tile. Sums are float32.
    """
    block, group, entry = locate_program(visibility.k_len, heads // repeats, S.block_n)
    first_key = block * S.block_n
    last_key = tl.minimum(first_key + S.block_n, visibility.k_len) - 1
    k = load_rows(locate(key, entry, group), key.row, first_key, visibility.k_len, S.block_n, S.head_dim, S.k_even)
    v = load_rows(locate(value, entry, group), value.row, first_key, visibility.k_len, S.block_n, S.value_dim, S.k_even)
    key_sums = new_sums(S.block_n, S.head_dim, S)
    value_sums = new_sums(S.block_n, S.value_dim, S)
    bounds = _query_blocks(visibility, entry, first_key, last_key, S)
    for repeat in tl.range(repeats):
        head = group * repeats + repeat
        c, inverse_radius, a = load_polynomial(scores, head, S)
        q = (locate(query, entry, head), query.row)
        do = (locate(grad_out, entry, head), grad_out.row)
        place = (entry.to(tl.int64) * heads + head) * visibility.q_len
        operands = (
            (k, v, first_key), (q, do, row_scale, delta, place), (c, inverse_radius, a, scale_slopes(c, a, S)),
            (entry, head, heads), scores, visibility, dropout,
        )  # fmt: skip
        key_sums, value_sums = visit_blocks(
            _grad_key_value_block, (key_sums, value_sums), operands, bounds, visibility, S.block_m, True, S
        )
    factor = zero_rows(S.block_n) + (S.degree if S.fold else 1)
    key_sums = finish_rows(key_sums, factor, S)
    value_sums = finish_rows(value_sums, zero_rows(S.block_n) + 1, S)
    store_rows(
        key_sums, locate(grad_key, entry, group), grad_key.row, first_key, visibility.k_len, S.block_n, S.head_dim
    )
    store_rows(
        value_sums, locate(grad_value, entry, group), grad_value.row, first_key, visibility.k_len, S.block_n,
        S.value_dim,
    )  # fmt: skip
