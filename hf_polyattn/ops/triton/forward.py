"""The forward kernel of backend `triton`: a block of query rows against their keys. `decode` has those for few rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import drop, keep_scale_of
from .loops import locate_query_rows, look, visit_blocks
from .polynomial import compute_factor, compute_t, compute_weights, load_offset, load_polynomial
from .shift import shift_rows
from .tiles import accumulate, finish_rows, load_rows, locate, multiply_transposed, new_sums, store_rows, zero_rows
from .visibility import (
    find_interval,
    find_key_blocks,
    find_visible,
    locate_mask_rows,
    scale_by_interval,
    scale_by_total,
)


@triton.jit
def weigh_block(state, x, start, operands, MASKED: tl.constexpr, S: tl.constexpr):
    """Adds the keys start..start + block_n, with the products x = q·k, to the sums of w·v and |w|."""
    sums, total = state
    value, a, b, c, seen, scores, visibility, dropout = operands
    low, high, mask_rows, words = seen
    even: tl.constexpr = S.k_even or not MASKED
    w = compute_weights(compute_t(x, a, b, scores, S), c, S)
    columns = (start + tl.arange(0, S.block_n))[None, :]
    if MASKED:
        w = tl.where(find_visible(low, high, mask_rows, columns, visibility), w, 0.0)
    if S.normalizer == "l1":
        total += tl.sum(w if S.squarings > 0 else tl.abs(w), 1)
    w = drop(w, words, columns, dropout)
    v = load_rows(value[0], value[1], start, visibility.k_len, S.block_n, S.value_dim, even)
    return accumulate(sums, w, v, S), total


@triton.jit
def forward_block(state, start, operands, MASKED: tl.constexpr, S: tl.constexpr):
    """Multiplies q with the keys start..start + block_n, and weighs their values."""
    q, key, k_len, weighing = operands
    even: tl.constexpr = S.k_even or not MASKED
    k = load_rows(key[0], key[1], start, k_len, S.block_n, S.head_dim, even)
    return weigh_block(state, multiply_transposed(q, k, S), start, weighing, MASKED, S)


@triton.jit
def forward_kernel(
    query, key, value, out, row_scale, scores, visibility, dropout, shift, heads, repeats, SHIFTED: tl.constexpr,
    SQUARES: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Computes block_m rows of the output of one head.

    Grid: blocks of query rows × heads × batch, in one dimension. Reads q once and k and v of all visible blocks, with a
    row shift k once more for each look that it takes; with a dense mask and no shift reads r_i, for l1 writes it.
    """
    _, head, entry, first, rows, places = locate_query_rows(visibility, heads, S)
    low, high = find_interval(visibility, entry, rows, S)
    seen = look(low, high, visibility, dropout, entry, head, heads, rows)
    c, inverse_radius, a = load_polynomial(scores, head, S)
    b = load_offset(scores, entry, head, rows, inverse_radius)[:, None]

    q = load_rows(locate(query, entry, head), query.row, first, visibility.q_len, S.block_m, S.head_dim, S.q_even)
    k = (locate(key, entry, head // repeats), key.row)
    v = (locate(value, entry, head // repeats), value.row)
    bounds = find_key_blocks(low, high, visibility, S)
    if SHIFTED:
        n = tl.maximum(high - low, 1).to(tl.float32)
        if visibility.mask is not None:
            n = tl.maximum(count_rows(seen[0], seen[1], seen[2], bounds, visibility, S), 1).to(tl.float32)
        center = tl.load(scores.center + head * scores.center_head)
        s = shift_rows(
            q, k, (seen[0], seen[1], seen[2]), n, bounds, center, places, head, scores, visibility, shift, SQUARES, S
        )
        b -= (inverse_radius * s)[:, None]
    operands = (q, k, visibility.k_len, (v, a, b, c, seen, scores, visibility, dropout))
    state = (new_sums(S.block_m, S.value_dim, S), zero_rows(S.block_m))
    sums, total = visit_blocks(forward_block, state, operands, bounds, visibility, S.block_n, S.k_even, S)

    factor = compute_factor(c, a, S)
    if S.normalizer == "l1":
        scale = scale_by_total(total * tl.abs(factor), S)
        tl.store(row_scale + places, scale, mask=first + tl.arange(0, S.block_m) < visibility.q_len)
    elif SHIFTED:
        scale = scale_by_total(n, S)
    elif visibility.mask is not None:
        scale = tl.load(row_scale + places)
    else:
        scale = scale_by_interval(low, high, S)
    sums = finish_rows(sums, scale * factor * keep_scale_of(dropout), S)
    store_rows(sums, locate(out, entry, head), out.row, first, visibility.q_len, S.block_m, S.value_dim)


@triton.jit
def count_rows(low, high, mask_rows, bounds, visibility, S: tl.constexpr):
    """Returns how many keys each row sees under a dense mask; low, high and the mask's rows are columns."""
    n = tl.sum(low * 0, 1)
    for start in tl.range(bounds[0], bounds[1], S.block_n):
        columns = (start + tl.arange(0, S.block_n))[None, :]
        n += tl.sum(find_visible(low, high, mask_rows, columns, visibility).to(tl.int32), 1)
    return n


@triton.jit
def count_kernel(row_scale, visibility, heads, S: tl.constexpr):
    """Writes r_i of block_m rows of one head under a dense mask. Grid: as `forward_kernel`."""
    _, head, entry, _, rows, places = locate_query_rows(visibility, heads, S)
    low, high = find_interval(visibility, entry, rows, S)
    mask_rows = locate_mask_rows(visibility, entry, head, rows)[:, None]
    bounds = find_key_blocks(low, high, visibility, S)
    n = count_rows(low[:, None], high[:, None], mask_rows, bounds, visibility, S)
    tl.store(row_scale + places, scale_by_total(n.to(tl.float32), S))
