"""The backward kernel of backend `triton` whose programs own query rows: dQ, and what sums over a row's keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import drop, keep_scale_of
from .loops import locate_query_rows, look, visit_blocks
from .polynomial import (
    compute_derivatives,
    compute_t,
    load_offset,
    load_polynomial,
    raise_to,
    scale_slopes,
    subtract_delta,
)
from .tiles import accumulate, finish_rows, load_rows, locate, multiply_transposed, new_sums, store_rows, zero_rows
from .visibility import find_interval, find_key_blocks, find_visible, scale_by_interval


@triton.jit
def _grad_query_block(state, start, operands, MASKED: tl.constexpr, S: tl.constexpr):
    """Adds the keys start..start + block_n to the sums of dt·k, dp·t^k and dt; the last two where they are not ()."""
    sums, shift, moments = state
    q, do, key, value, a, b, c, slopes, delta, seen, scores, visibility, dropout = operands
    low, high, mask_rows, words = seen
    even: tl.constexpr = S.k_even or not MASKED
    k = load_rows(key[0], key[1], start, visibility.k_len, S.block_n, S.head_dim, even)
    v = load_rows(value[0], value[1], start, visibility.k_len, S.block_n, S.value_dim, even)
    t = compute_t(multiply_transposed(q, k, S), a, b, scores, S)
    dw = multiply_transposed(do, v, S)
    columns = (start + tl.arange(0, S.block_n))[None, :]
    if MASKED:  # t too: what is hidden may overflow
        visible = find_visible(low, high, mask_rows, columns, visibility)
        t = tl.where(visible, t, 0.0)
    w, outer, inner = compute_derivatives(t, c, slopes, S)
    dw = subtract_delta(drop(dw, words, columns, dropout), w, delta, S)
    if MASKED:
        dw = tl.where(visible, dw, 0.0)
    if S.squarings > 0:
        dw *= outer
    dt = dw * inner

    if len(moments) > 0 and S.monomial:
        moments = (moments[0] + tl.sum(dt * t, 1),)
    elif len(moments) > 0:
        added = ()
        for k_power in tl.static_range(len(moments)):
            added = added + (moments[k_power] + tl.sum(dw, 1),)
            dw *= t
        moments = added
    if S.clamp:
        dt = tl.where(tl.abs(t) < 1.0, dt, 0.0)
    if len(shift) > 0:
        shift = (shift[0] + tl.sum(dt, 1),)
    return accumulate(sums, dt, k, S), shift, moments


@triton.jit
def grad_query_kernel(
    query, key, value, grad_out, grad_query, row_scale, delta, partial_moments, grad_center, scores, visibility,
    dropout, heads, repeats, MOMENTS: tl.constexpr, SHIFT: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Computes dQ of block_m rows of one head, and what else sums over the keys of a row.

    Grid: as `forward_kernel`. With MOMENTS writes the coefficients' gradient over these rows (B, H, blocks, P + 1;
    of a monomial only c_P's), with SHIFT the center's (B, H, Tq). Sums are float32.
    """
    block, head, entry, first, rows, places = locate_query_rows(visibility, heads, S)
    low, high = find_interval(visibility, entry, rows, S)
    seen = look(low, high, visibility, dropout, entry, head, heads, rows)
    c, inverse_radius, a = load_polynomial(scores, head, S)
    b = load_offset(scores, entry, head, rows, inverse_radius)[:, None]
    slopes = scale_slopes(c, a if S.fold else inverse_radius, S)  # no scaling in dcenter, where it may be 0

    q = load_rows(locate(query, entry, head), query.row, first, visibility.q_len, S.block_m, S.head_dim, S.q_even)
    do = load_rows(
        locate(grad_out, entry, head), grad_out.row, first, visibility.q_len, S.block_m, S.value_dim, S.q_even
    )
    delta_rows = zero_rows(S.block_m)[:, None]
    if S.normalizer == "l1":
        inside = first + tl.arange(0, S.block_m) < visibility.q_len
        delta_rows = tl.load(delta + places, mask=inside, other=0.0)[:, None]

    k = (locate(key, entry, head // repeats), key.row)
    v = (locate(value, entry, head // repeats), value.row)
    shift = ()
    if SHIFT:
        shift = (zero_rows(S.block_m),)
    moments = ()
    if MOMENTS:
        for _ in tl.static_range(len(c)):
            moments = moments + (zero_rows(S.block_m),)
    operands = (q, do, k, v, a, b, c, slopes, delta_rows, seen, scores, visibility, dropout)
    # With moments before shift, ptxas takes up to 31 registers more.
    state = (new_sums(S.block_m, S.head_dim, S), shift, moments)
    bounds = find_key_blocks(low, high, visibility, S)
    sums, shift, moments = visit_blocks(_grad_query_block, state, operands, bounds, visibility, S.block_n, S.k_even, S)

    if S.normalizer == "l1" or visibility.mask is not None:
        scale = tl.load(row_scale + places)
    else:
        scale = scale_by_interval(low, high, S)
    scale *= keep_scale_of(dropout)
    if S.monomial:
        slope_scale = scale * slopes[0]
    else:
        slope_scale = scale
    score_scale = slope_scale if S.fold else slope_scale * scores.scaling
    store_rows(
        finish_rows(sums, score_scale, S), locate(grad_query, entry, head), grad_query.row, first, visibility.q_len,
        S.block_m, S.head_dim,
    )  # fmt: skip
    if SHIFT:
        inside = first + tl.arange(0, S.block_m) < visibility.q_len
        tl.store(grad_center + places, shift[0] * -slope_scale, mask=inside)
    if MOMENTS:
        blocks = tl.cdiv(visibility.q_len, S.block_m)
        part = (entry.to(tl.int64) * heads + head) * blocks + block
        for k_power in tl.static_range(len(moments)):
            moment = tl.sum(moments[k_power] * scale, 0)
            if S.fold:
                moment *= raise_to(a, S.degree)
            tl.store(partial_moments + part * len(moments) + k_power, moment)
