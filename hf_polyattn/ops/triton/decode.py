"""The kernels of backend `triton` for few queries against many keys.

Parts of the keys run side by side, and what they give is added in order. The rows of the query heads that share a key
head are the rows of one tile (head r, query i) -> r · Tq + i, so that keys and values are read once. With a row shift
the products q·k are written once, with the moments of each part, and read by whatever follows: row sums, then weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import keep_scale_of
from .forward import forward_block, weigh_block
from .loops import locate_program, look
from .polynomial import (
    compute_factor,
    compute_t,
    compute_weights,
    load_coefficients,
    load_inverse_radius,
    load_offset,
)
from .shift import join_moments, load_refinement, predict_shift, take_step
from .tiles import (
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
from .visibility import find_interval, find_key_blocks, find_visible, locate_mask_rows, scale_by_total


@triton.jit
def _locate_part(visibility, heads, repeats, split_keys, splits, S: tl.constexpr):
    """Returns what a program of splits × key heads × batch, in one dimension, owns: its number, with the split the
    fastest, key head and batch entry; of its rows the lines, which are used, head, query, and low and high in its part.
    """
    split, group, entry = locate_program(splits, heads // repeats, 1)
    part = (entry.to(tl.int64) * (heads // repeats) + group) * splits + split
    lines = tl.arange(0, S.block_m)
    used = lines < repeats * visibility.q_len
    head = group * repeats + tl.where(used, lines // visibility.q_len, 0)
    rows = tl.where(used, lines % visibility.q_len, 0)
    low, high = find_interval(visibility, entry, rows, S)
    low = tl.maximum(low, split * split_keys)
    high = tl.minimum(high, (split + 1) * split_keys)
    return part, group, entry, lines, used, head, rows, low, high


@triton.jit
def _load_lines(query, entry, head, rows, used, S: tl.constexpr):
    """Returns the queries of a tile whose rows are of several heads."""
    q = ()
    starts = query.pointer + entry.to(tl.int64) * query.batch + head.to(tl.int64) * query.head + rows * query.row
    for chunk in tl.static_range(count_chunks(S.head_dim)):
        columns = chunk_start(S.head_dim, chunk) + tl.arange(0, chunk_width(S.head_dim, chunk))[None, :]
        q = q + (tl.load(starts[:, None] + columns, mask=used[:, None] & (columns < S.head_dim), other=0.0),)
    return q


@triton.jit
def _locate_products(products, entry, head, heads, rows, visibility):
    """Returns the pointers to the products of a tile's rows, as a column."""
    places = (entry.to(tl.int64) * heads + head) * visibility.q_len + rows
    return (products + places * visibility.k_len)[:, None]


@triton.jit
def decode_kernel(
    query, key, value, products, partial, totals, scores, visibility, dropout, heads, repeats, split_keys, splits,
    S: tl.constexpr,
):  # fmt: skip
    """Sums w·v and |w| of all the query rows of one key head over one part of the keys.

    Grid and rows: of `_locate_part`. Either query and key are None, or products (B, H, Tq, Tk), which `products_kernel`
    wrote. Writes float32 partial sums (batch, key head, split, block_m, Dv) and totals (batch, key head,
    split, block_m); totals count visible keys where the normalizer needs that instead.
    """
    part, group, entry, lines, used, head, rows, low, high = _locate_part(
        visibility, heads, repeats, split_keys, splits, S
    )
    seen = look(low, high, visibility, dropout, entry, head, heads, rows)
    c = load_coefficients(scores, head[:, None], S)
    inverse_radius = load_inverse_radius(scores, head)
    a = (scores.scaling * inverse_radius)[:, None]
    b = load_offset(scores, entry, head, rows, inverse_radius)[:, None]

    v = (locate(value, entry, group), value.row)
    weighing = (v, a, b, c, seen, scores, visibility, dropout)
    if products is None:
        q = _load_lines(query, entry, head, rows, used, S)
        operands = (q, (locate(key, entry, group), key.row), visibility.k_len, weighing)
    else:
        x_rows = _locate_products(products, entry, head, heads, rows, visibility)
    sums = new_sums(S.block_m, S.value_dim, S)
    total = zero_rows(S.block_m)
    begin, end, _, _ = find_key_blocks(low, high, visibility, S)
    for start in tl.range(begin, end, S.block_n):
        if products is None:
            sums, total = forward_block((sums, total), start, operands, True, S)
        else:
            columns = (start + tl.arange(0, S.block_n))[None, :]
            x = tl.load(x_rows + columns, mask=columns < visibility.k_len, other=0.0)
            sums, total = weigh_block((sums, total), x, start, weighing, True, S)
        if S.normalizer == "rsqrt" or S.normalizer == "mean":
            keys = (start + tl.arange(0, S.block_n))[None, :]
            visible = find_visible(seen[0], seen[1], seen[2], keys, visibility)
            total += tl.sum(visible.to(tl.float32), 1)

    factor = tl.reshape(compute_factor(c, a, S), S.block_m)
    if S.normalizer == "l1":
        total *= tl.abs(factor)
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


# With a row shift --------------------------------------------------------------------------------------------


@triton.jit
def products_kernel(
    query, key, products, parts, visibility, heads, repeats, split_keys, splits, S: tl.constexpr
):  # fmt: skip
    """Writes q·k of what the query rows of one key head see in one part of the keys, and their moments.

    Grid and rows: of `_locate_part`. Products are (B, H, Tq, Tk); parts (batch, key head, split, 3, block_m) have how
    many there are, their mean and the sum of their squared deviations.
    """
    part, group, entry, lines, used, head, rows, low, high = _locate_part(
        visibility, heads, repeats, split_keys, splits, S
    )
    mask_rows = locate_mask_rows(visibility, entry, head, rows)[:, None]
    q = _load_lines(query, entry, head, rows, used, S)
    base = locate(key, entry, group)
    out = _locate_products(products, entry, head, heads, rows, visibility)
    state = (zero_rows(S.block_m), zero_rows(S.block_m), zero_rows(S.block_m))
    begin, end, _, _ = find_key_blocks(low, high, visibility, S)
    for start in tl.range(begin, end, S.block_n):
        columns = (start + tl.arange(0, S.block_n))[None, :]
        k = load_rows(base, key.row, start, visibility.k_len, S.block_n, S.head_dim, S.k_even)
        x = multiply_transposed(q, k, S)
        visible = find_visible(low[:, None], high[:, None], mask_rows, columns, visibility)
        tl.store(out + columns, x, mask=visible & used[:, None])
        state = join_moments(state, x, tl.sum(visible.to(tl.int32), 1).to(tl.float32), visible, True)
    for number in tl.static_range(3):
        tl.store(parts + (part * 3 + number) * S.block_m + lines, state[number])


@triton.jit
def predict_kernel(
    query, parts, centers, counts, scores, shift, q_len, heads, repeats, splits, SPLITS: tl.constexpr,
    SQUARES: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Writes center + s_i of a row before any refinement, and its visible keys, (B, H, Tq) each.

    Grid: query rows × heads × batch. SPLITS is the power of 2 from `splits` on.
    """
    row, head, entry = locate_program(q_len, heads, 1)
    place = (entry.to(tl.int64) * heads + head) * q_len + row + tl.arange(0, 1)
    count, at, inside = _load_parts(parts, 3, row, head, entry, q_len, heads, repeats, splits, SPLITS, S)
    mean = tl.load(at + S.block_m, mask=inside, other=0.0)
    deviations = tl.load(at + 2 * S.block_m, mask=inside, other=0.0)
    n = tl.maximum(tl.sum(count, 1), 1.0)
    average = tl.sum(count * mean, 1) / n
    away = mean - average[:, None]
    variance = tl.sum(deviations + count * away * away, 1) / n
    q = load_rows(locate(query, entry, head), query.row, row, q_len, 1, S.head_dim, True)
    variance *= scores.scaling * scores.scaling
    s = predict_shift(q, scores.scaling * average, variance, n, head, scores.scaling, shift, SQUARES, S)
    tl.store(centers + place, s + tl.load(scores.center + head * scores.center_head))
    tl.store(counts + place, n)


@triton.jit
def _load_parts(
    parts, NUMBERS: tl.constexpr, row, head, entry, q_len, heads, repeats, splits, SPLITS: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Returns of a row the first of NUMBERS that each split wrote, (1, SPLITS), their pointers, and which are there."""
    line = head % repeats * q_len + row
    first = (entry.to(tl.int64) * (heads // repeats) + head // repeats) * splits
    numbers = tl.arange(0, SPLITS)[None, :]
    at = parts + (first + numbers) * NUMBERS * S.block_m + line
    inside = numbers < splits
    return tl.load(at, mask=inside, other=0.0), at, inside


@triton.jit
def row_sum_kernel(
    products, centers, parts, refinement, scores, visibility, heads, repeats, split_keys, splits, S: tl.constexpr
):  # fmt: skip
    """Writes the row sums of a refinement's polynomial over one part of the keys, (batch, key head, split, block_m).

    Grid and rows: of `_locate_part`.
    """
    part, _, entry, lines, used, head, rows, low, high = _locate_part(visibility, heads, repeats, split_keys, splits, S)
    mask_rows = locate_mask_rows(visibility, entry, head, rows)[:, None]
    places = (entry.to(tl.int64) * heads + head) * visibility.q_len + rows
    c, offset, inverse_radius = load_refinement(refinement, head[:, None], S)
    a = scores.scaling * inverse_radius
    b = -inverse_radius * (tl.load(centers + places)[:, None] + offset)
    x_rows = _locate_products(products, entry, head, heads, rows, visibility)
    total = zero_rows(S.block_m)
    begin, end, _, _ = find_key_blocks(low, high, visibility, S)
    for start in tl.range(begin, end, S.block_n):
        columns = (start + tl.arange(0, S.block_n))[None, :]
        visible = find_visible(low[:, None], high[:, None], mask_rows, columns, visibility)
        x = tl.load(x_rows + columns, mask=visible & used[:, None], other=0.0)
        total += tl.sum(tl.where(visible, compute_weights(compute_t(x, a, b, scores, S), c, S), 0.0), 1)
    tl.store(parts + part * S.block_m + lines, total)


@triton.jit
def step_kernel(
    parts, centers, counts, refinement, q_len, heads, repeats, splits, SPLITS: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Adds the step of a refinement to the center of a row. Grid: query rows × heads × batch."""
    row, head, entry = locate_program(q_len, heads, 1)
    place = (entry.to(tl.int64) * heads + head) * q_len + row + tl.arange(0, 1)
    sums, _, _ = _load_parts(parts, 1, row, head, entry, q_len, heads, repeats, splits, SPLITS, S)
    g = take_step(tl.sum(sums, 1), tl.load(counts + place), refinement, head, S)
    tl.store(centers + place, tl.load(centers + place) + g)
