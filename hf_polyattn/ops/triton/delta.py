"""The first backward kernel of backend `triton`, of l1 alone: δ, what each row's gradient loses to its row sum."""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import drop, keep_scale_of
from .loops import locate_query_rows, look, visit_blocks
from .polynomial import compute_factor, compute_t, compute_weights, load_offset, load_polynomial
from .tiles import dot_rows, load_rows, locate, multiply_transposed, zero_rows
from .visibility import find_interval, find_key_blocks, find_visible


@triton.jit
def _delta_block(total, start, operands, MASKED: tl.constexpr, S: tl.constexpr):
    """Adds the keys start..start + block_n to the sum of w·g."""
    q, do, key, value, a, b, c, seen, scores, visibility, dropout = operands
    low, high, mask_rows, words = seen
    even: tl.constexpr = S.k_even or not MASKED
    k = load_rows(key[0], key[1], start, visibility.k_len, S.block_n, S.head_dim, even)
    v = load_rows(value[0], value[1], start, visibility.k_len, S.block_n, S.value_dim, even)
    w = compute_weights(compute_t(multiply_transposed(q, k, S), a, b, scores, S), c, S)
    columns = (start + tl.arange(0, S.block_n))[None, :]
    if MASKED:
        w = tl.where(find_visible(low, high, mask_rows, columns, visibility), w, 0.0)
    w = drop(w, words, columns, dropout)
    return total + tl.sum(w * multiply_transposed(do, v, S), 1)


@triton.jit
def delta_kernel(
    query, key, value, grad_out, out, delta, row_scale, scores, visibility, dropout, heads, repeats,
    EXACT: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Writes δ_i of l1, (B, H, Tq), without the scale of dropout, and with the sign of w's factor.

    Grid: as `forward_kernel`. dO·O serves dQ, dK and dV; the gradients of the coefficients and of the center are sums
    in which most cancels (l1 does not change with the scale of p, and hardly with the center if p^s is near exp), and
    the rounding of O and of the forward's w would be all that remains. EXACT sums float32 w·g for them.
    """
    _, head, entry, first, rows, places = locate_query_rows(visibility, heads, S)
    c, inverse_radius, a = load_polynomial(scores, head, S)
    factor = compute_factor(c, a, S)
    do = load_rows(
        locate(grad_out, entry, head), grad_out.row, first, visibility.q_len, S.block_m, S.value_dim, S.q_even
    )
    if EXACT:
        low, high = find_interval(visibility, entry, rows, S)
        seen = look(low, high, visibility, dropout, entry, head, heads, rows)
        b = load_offset(scores, entry, head, rows, inverse_radius)[:, None]
        q = load_rows(locate(query, entry, head), query.row, first, visibility.q_len, S.block_m, S.head_dim, S.q_even)
        k = (locate(key, entry, head // repeats), key.row)
        v = (locate(value, entry, head // repeats), value.row)
        operands = (q, do, k, v, a, b, c, seen, scores, visibility, dropout)
        bounds = find_key_blocks(low, high, visibility, S)
        total = visit_blocks(_delta_block, zero_rows(S.block_m), operands, bounds, visibility, S.block_n, S.k_even, S)
        total *= tl.load(row_scale + places) * tl.abs(factor)
    else:
        o = load_rows(locate(out, entry, head), out.row, first, visibility.q_len, S.block_m, S.value_dim, S.q_even)
        total = dot_rows(do, o) * tl.where(factor < 0.0, -1.0, 1.0) / keep_scale_of(dropout)
    tl.store(delta + places, total, mask=first + tl.arange(0, S.block_m) < visibility.q_len)
