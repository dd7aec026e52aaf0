"""The forward kernels of backend `triton`: a block of query rows, or few queries against parts of many keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import drop, keep_scale_of
from .loops import locate_program, locate_query_rows, look, visit_blocks
from .polynomial import (
    compute_factor,
    compute_t,
    compute_weights,
    load_coefficients,
    load_inverse_radius,
    load_offset,
    load_polynomial,
)
from .tiles import (
    accumulate,
    chunk_start,
    chunk_width,
    count_chunks,
    finish_rows,
    load_rows,
    locate,
    multiply_transposed,
    new_sums,
    store_rows,
    zero_rows,
)
from .visibility import (
    find_interval,
    find_key_blocks,
    find_visible,
    locate_mask_rows,
    scale_by_interval,
    scale_by_total,
)


@triton.jit
def _forward_block(state, start, operands, MASKED: tl.constexpr, S: tl.constexpr):
    """Adds the keys start..start + block_n to the sums of w·v and |w|."""
    sums, total = state
    q, key, value, a, b, c, seen, scores, visibility, dropout = operands
    low, high, mask_rows, words = seen
    even: tl.constexpr = S.k_even or not MASKED
    k = load_rows(key[0], key[1], start, visibility.k_len, S.block_n, S.head_dim, even)
    t = compute_t(multiply_transposed(q, k, S), a, b, scores, S)
    w = compute_weights(t, c, S)
    columns = (start + tl.arange(0, S.block_n))[None, :]
    if MASKED:
        w = tl.where(find_visible(low, high, mask_rows, columns, visibility), w, 0.0)
    if S.normalizer == "l1":
        total += tl.sum(w if S.squarings > 0 else tl.abs(w), 1)
    w = drop(w, words, columns, dropout)
    v = load_rows(value[0], value[1], start, visibility.k_len, S.block_n, S.value_dim, even)
    return accumulate(sums, w, v, S), total


@triton.jit
def forward_kernel(
    query, key, value, out, row_scale, scores, visibility, dropout, heads, repeats, S: tl.constexpr
):  # fmt: skip
    """Computes block_m rows of the output of one head.

    Grid: blocks of query rows × heads × batch, in one dimension. Reads q once and k and v of all visible blocks;
    with a dense mask reads r_i, for l1 writes it.
    """
    _, head, entry, first, rows, places = locate_query_rows(visibility, heads, S)
    low, high = find_interval(visibility, entry, rows, S)
    seen = look(low, high, visibility, dropout, entry, head, heads, rows)
    c, inverse_radius, a = load_polynomial(scores, head, S)
    b = load_offset(scores, entry, head, rows, inverse_radius)[:, None]

    q = load_rows(locate(query, entry, head), query.row, first, visibility.q_len, S.block_m, S.head_dim, S.q_even)
    k = (locate(key, entry, head // repeats), key.row)
    v = (locate(value, entry, head // repeats), value.row)
    operands = (q, k, v, a, b, c, seen, scores, visibility, dropout)
    state = (new_sums(S.block_m, S.value_dim, S), zero_rows(S.block_m))
    bounds = find_key_blocks(low, high, visibility, S)
    sums, total = visit_blocks(_forward_block, state, operands, bounds, visibility, S.block_n, S.k_even, S)

    factor = compute_factor(c, a, S)
    if S.normalizer == "l1":
        scale = scale_by_total(total * tl.abs(factor), S)
        tl.store(row_scale + places, scale, mask=first + tl.arange(0, S.block_m) < visibility.q_len)
    elif visibility.mask is not None:
        scale = tl.load(row_scale + places)
    else:
        scale = scale_by_interval(low, high, S)
    sums = finish_rows(sums, scale * factor * keep_scale_of(dropout), S)
    store_rows(sums, locate(out, entry, head), out.row, first, visibility.q_len, S.block_m, S.value_dim)


@triton.jit
def count_kernel(row_scale, visibility, heads, S: tl.constexpr):
    """Writes r_i of block_m rows of one head under a dense mask. Grid: as `forward_kernel`."""
    _, head, entry, _, rows, places = locate_query_rows(visibility, heads, S)
    low, high = find_interval(visibility, entry, rows, S)
    mask_rows = locate_mask_rows(visibility, entry, head, rows)[:, None]
    begin, end, _, _ = find_key_blocks(low, high, visibility, S)
    n = rows * 0
    for start in tl.range(begin, end, S.block_n):
        columns = (start + tl.arange(0, S.block_n))[None, :]
        n += tl.sum(find_visible(low[:, None], high[:, None], mask_rows, columns, visibility).to(tl.int32), 1)
    tl.store(row_scale + places, scale_by_total(n.to(tl.float32), S))


# Decode -----------------------------------------------------------------------------------------------------


@triton.jit
def decode_kernel(
    query, key, value, partial, totals, scores, visibility, dropout, heads, repeats, split_keys, splits,
    S: tl.constexpr,
):  # fmt: skip
    """Sums w·v and |w| of all the query rows of one key head over one part of the keys.

    Grid: splits × key heads × batch, in one dimension. The rows of the query heads that share a key head are the
    rows of one tile (head r, query i) -> r · Tq + i, so that keys and values are read once. Writes float32 partial
    sums (batch, key head, split, block_m, Dv) and totals (batch, key head, split, block_m); totals count visible
    keys where the normalizer needs that instead.
    """
    groups = heads // repeats
    split, group, entry = locate_program(splits, groups, 1)
    lines = tl.arange(0, S.block_m)
    used = lines < repeats * visibility.q_len
    head = group * repeats + tl.where(used, lines // visibility.q_len, 0)
    rows = tl.where(used, lines % visibility.q_len, 0)
    low, high = find_interval(visibility, entry, rows, S)
    low = tl.maximum(low, split * split_keys)
    high = tl.minimum(high, (split + 1) * split_keys)
    seen = look(low, high, visibility, dropout, entry, head, heads, rows)
    c = load_coefficients(scores, head[:, None], S)
    inverse_radius = load_inverse_radius(scores, head)
    a = (scores.scaling * inverse_radius)[:, None]
    b = load_offset(scores, entry, head, rows, inverse_radius)[:, None]

    q = ()
    starts = query.pointer + entry.to(tl.int64) * query.batch + head.to(tl.int64) * query.head + rows * query.row
    for chunk in tl.static_range(count_chunks(S.head_dim)):
        columns = chunk_start(S.head_dim, chunk) + tl.arange(0, chunk_width(S.head_dim, chunk))[None, :]
        q = q + (tl.load(starts[:, None] + columns, mask=used[:, None] & (columns < S.head_dim), other=0.0),)
    k = (locate(key, entry, group), key.row)
    v = (locate(value, entry, group), value.row)
    operands = (q, k, v, a, b, c, seen, scores, visibility, dropout)
    sums = new_sums(S.block_m, S.value_dim, S)
    total = zero_rows(S.block_m)
    begin, end, _, _ = find_key_blocks(low, high, visibility, S)
    for start in tl.range(begin, end, S.block_n):
        sums, total = _forward_block((sums, total), start, operands, True, S)
        if S.normalizer == "rsqrt" or S.normalizer == "mean":
            keys = (start + tl.arange(0, S.block_n))[None, :]
            visible = find_visible(seen[0], seen[1], seen[2], keys, visibility)
            total += tl.sum(visible.to(tl.float32), 1)

    factor = tl.reshape(compute_factor(c, a, S), S.block_m)
    if S.normalizer == "l1":
        total *= tl.abs(factor)
    part = tl.program_id(0).to(tl.int64)  # entry, group, split in this order, split the fastest
    part = (entry.to(tl.int64) * groups + group) * splits + split
    tl.store(totals + part * S.block_m + lines, total)
    sums = finish_rows(sums, factor * keep_scale_of(dropout), S)
    store_rows(sums, partial + part * S.block_m * S.value_dim, S.value_dim, 0, S.block_m, S.block_m, S.value_dim)


@triton.jit
def decode_sum_kernel(partial, totals, out, row_scale, q_len, heads, repeats, splits, S: tl.constexpr):
    """Adds the parts of one output row in order and scales it. Grid: query rows × heads × batch."""
    row, head, entry = locate_program(q_len, heads, 1)
    line = head % repeats * q_len + row
    part = (entry.to(tl.int64) * (heads // repeats) + head // repeats) * splits
    total = 0.0
    sums = ()
    for chunk in tl.static_range(count_chunks(S.value_dim)):
        sums = sums + (tl.zeros((1, chunk_width(S.value_dim, chunk)), tl.float32),)
    for split in tl.range(splits):
        at = (part + split) * S.block_m + line
        total += tl.load(totals + at)
        tiles = load_rows(partial + at * S.value_dim, S.value_dim, 0, 1, 1, S.value_dim, True)
        added = ()
        for chunk in tl.static_range(len(sums)):
            added = added + (sums[chunk] + tiles[chunk],)
        sums = added
    scale = scale_by_total(total, S)
    if S.normalizer == "l1":
        tl.store(row_scale + (entry.to(tl.int64) * heads + head) * q_len + row, scale)
    scaled = ()
    for chunk in tl.static_range(len(sums)):
        scaled = scaled + (sums[chunk] * scale,)
    store_rows(scaled, locate(out, entry, head), out.row, row, q_len, 1, S.value_dim)
