"""The row shift in the Triton kernels: s_i of a row, from its query, the moments of its scores and its row sums.

The formula is that of `patching.row_shift`. Where the moments are not given, a look at all keys finds them, block by
block: the mean and the sum of squared deviations of a block join those of the blocks before (Chan, Golub and LeVeque
1979), so that no difference of large sums is taken. Each refinement takes one look more. No look reads a value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..module import FEATURES, ROW_SUMS, STEPS
from .loops import visit_blocks
from .polynomial import compute_t, compute_weights
from .tiles import chunk_start, chunk_width, count_chunks, load_rows, multiply_transposed, zero_rows
from .visibility import find_visible

_FEATURES = tl.constexpr(len(FEATURES))
_LOG_N = tl.constexpr(FEATURES.index("log n"))
_STEPS = tl.constexpr(STEPS)
_LEAST, _MOST = map(tl.constexpr, ROW_SUMS)


@triton.jit
def _project(q, vector, S: tl.constexpr):
    """Returns the product of each row of q with a vector (D,)."""
    total = tl.sum(q[0].to(tl.float32) * 0.0, 1)
    for chunk in tl.static_range(count_chunks(S.head_dim)):
        columns = chunk_start(S.head_dim, chunk) + tl.arange(0, chunk_width(S.head_dim, chunk))
        numbers = tl.load(vector + columns, mask=columns < S.head_dim, other=0.0)
        total += tl.sum(q[chunk].to(tl.float32) * numbers[None, :], 1)
    return total


@triton.jit
def _weigh(feature, at, shift):
    """Returns w_f (φ_f − mean_f) / scale_f."""
    return tl.load(shift.weights + at) / tl.load(shift.scales + at) * (feature - tl.load(shift.means + at))


@triton.jit
def predict_shift(q, mean, variance, n, head, scaling, shift, SQUARES: tl.constexpr, S: tl.constexpr):
    """Returns s_i before any refinement; mean and variance are of the scaled scores."""
    s = scaling * _project(q, shift.key_shift + head * S.head_dim, S)
    if shift.weights is not None:
        s += mean + 0.5 * variance
        if S.normalizer == "rsqrt":
            s += 0.5 * tl.log(n)
        elif S.normalizer != "mean":
            s += tl.log(n)
        known = tl.minimum(tl.maximum(n, tl.load(shift.lengths)), tl.load(shift.lengths + 1))
        log_n = tl.log(known)
        at = head * (_FEATURES + SQUARES)
        away = log_n - tl.load(shift.means + at + _LOG_N)
        s += away * scaling * _project(q, shift.length_shift + head * S.head_dim, S)
        features = (
            mean, variance, mean * mean, mean * variance, variance * variance, variance * variance * variance, log_n,
            1.0 / known,
        )  # fmt: skip
        for feature in tl.static_range(_FEATURES):
            s += _weigh(features[feature], at + feature, shift)
        for square in tl.static_range(SQUARES):
            form = scaling * _project(q, shift.squares + (head * SQUARES + square) * S.head_dim, S)
            s += _weigh(form * form, at + _FEATURES + square, shift)
    return s


# One look at the keys ---------------------------------------------------------------------------------------


@triton.jit
def join_moments(state, x, number, visible, MASKED: tl.constexpr):
    """Returns how many scores there are, their mean and the sum of their squared deviations, with those of a tile.

    `number` says how many of a row's are visible; without MASKED all are.
    """
    count, mean, deviations = state
    if MASKED:
        x = tl.where(visible, x, 0.0)
    own = tl.sum(x, 1) / tl.maximum(number, 1.0)
    away = x - own[:, None]
    if MASKED:
        away = tl.where(visible, away, 0.0)
    total = count + number
    difference = own - mean
    share = number / tl.maximum(total, 1.0)
    deviations += tl.sum(away * away, 1) + difference * difference * count * share
    return total, mean + difference * share, deviations


@triton.jit
def _moments_block(state, start, operands, MASKED: tl.constexpr, S: tl.constexpr):
    """Adds the keys start..start + block_n to the moments of the products q·k."""
    q, key, seen, visibility = operands
    low, high, mask_rows = seen
    even: tl.constexpr = S.k_even or not MASKED
    k = load_rows(key[0], key[1], start, visibility.k_len, S.block_n, S.head_dim, even)
    x = multiply_transposed(q, k, S)
    if MASKED:
        columns = (start + tl.arange(0, S.block_n))[None, :]
        visible = find_visible(low, high, mask_rows, columns, visibility)
        state = join_moments(state, x, tl.sum(visible.to(tl.int32), 1).to(tl.float32), visible, True)
    else:
        state = join_moments(state, x, zero_rows(S.block_m) + S.block_n, x, False)
    return state


@triton.jit
def load_refinement(part, head, S: tl.constexpr):
    """Returns the coefficients, the center and 1 / radius of the polynomial that a refinement sums."""
    degree: tl.constexpr = S.degree
    c = ()
    for k in tl.static_range(degree + 1):
        c = c + (tl.load(part.coefficients + head * (degree + 1) + k),)
    return c, tl.load(part.center + head), 1.0 / tl.load(part.radius + head)


@triton.jit
def _row_sum_block(total, start, operands, MASKED: tl.constexpr, S: tl.constexpr):
    """Adds the keys start..start + block_n to the row sums of a refinement's polynomial."""
    q, key, seen, visibility, a, b, c, scores = operands
    low, high, mask_rows = seen
    even: tl.constexpr = S.k_even or not MASKED
    k = load_rows(key[0], key[1], start, visibility.k_len, S.block_n, S.head_dim, even)
    w = compute_weights(compute_t(multiply_transposed(q, k, S), a, b, scores, S), c, S)
    if MASKED:
        columns = (start + tl.arange(0, S.block_n))[None, :]
        w = tl.where(find_visible(low, high, mask_rows, columns, visibility), w, 0.0)
    return total + tl.sum(w, 1)


@triton.jit
def take_step(total, n, part, head, S: tl.constexpr):
    """Returns g(S_i) of a row sum without its row scale."""
    if S.normalizer == "rsqrt":
        total /= tl.sqrt_rn(n)
    elif S.normalizer == "mean":
        total /= n
    z = tl.minimum(tl.maximum(total, _LEAST), _MOST) - 1.0
    steps = part.steps + head * _STEPS
    g = z * 0.0 + tl.load(steps + _STEPS - 1)
    for power in tl.static_range(_STEPS - 2, -1, -1):
        g = g * z + tl.load(steps + power)
    return g


@triton.jit
def _refine(s, q, key, seen, n, bounds, center, head, scores, visibility, part, S: tl.constexpr):
    """Returns s_i + g(S_i)."""
    c, offset, inverse_radius = load_refinement(part, head, S)
    b = (-inverse_radius * (center + offset + s))[:, None]
    operands = (q, key, seen, visibility, scores.scaling * inverse_radius, b, c, scores)
    total = visit_blocks(_row_sum_block, zero_rows(S.block_m), operands, bounds, visibility, S.block_n, S.k_even, S)
    return s + take_step(total, n, part, head, S)


@triton.jit
def shift_rows(
    q, key, seen, n, bounds, center, places, head, scores, visibility, shift, SQUARES: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Returns s_i of a tile of query rows of one head.

    Args:
        q, key: the tile, and the pointer and the stride of the keys' rows.
        seen: low, high and the mask's rows as columns.
        n: visible keys of each row, at least 1.
        bounds: of `find_key_blocks`.
        center: of the head.
        places: of the rows in a contiguous (B, H, Tq).
    """
    mean = zero_rows(S.block_m)
    variance = mean
    if shift.weights is not None:
        if shift.mean is not None:
            mean = tl.load(shift.mean + places)
            variance = tl.load(shift.variance + places)
        else:
            state = (mean, mean, mean)
            operands = (q, key, seen, visibility)
            state = visit_blocks(_moments_block, state, operands, bounds, visibility, S.block_n, S.k_even, S)
            mean = scores.scaling * state[1]
            variance = scores.scaling * scores.scaling * state[2] / n
    s = predict_shift(q, mean, variance, n, head, scores.scaling, shift, SQUARES, S)
    if shift.first is not None:
        s = _refine(s, q, key, seen, n, bounds, center, head, scores, visibility, shift.first, S)
    if shift.second is not None:
        s = _refine(s, q, key, seen, n, bounds, center, head, scores, visibility, shift.second, S)
    return s
