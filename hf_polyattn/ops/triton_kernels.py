"""The kernels of backend `triton`. No exponential and no running maximum: partial sums only add.

    t_ij = a · q_i·k_j + b_i                      a = scaling / radius, b_i = −center_i / radius; may be clamped
    w_ij = m_ij · p(t_ij)^s                       out_i = r_i Σ_j w_ij v_j
    dw   = g − δ_i sign w                         g_ij = dO_i·v_j; δ_i = dO_i·O_i for l1, else 0
    dp   = dw · s p^(s−1)                         dc_k = Σ r_i dp t^k
    dt   = dp · p'(t)                             dcenter_i = −r_i Σ_j dt / radius, dQ_i = r_i a Σ_j dt k_j

Scores, polynomials and sums are float32. Factors of whole rows (r, and for a monomial its coefficient) are applied
once to the accumulated row where the kernel's rows are queries. w and dt are cast to the operands' dtype last, for
the second matrix product; in float16 each row of a tile is divided by its largest magnitude before, and the product
multiplied by it, so that neither a w of e^-80 nor a score of 1e3 cubed leaves the range.

Which keys a query row sees is an interval [low, high), from `causal`, `window` and `ranges` together, and a dense
mask on top. Key blocks that no row of a tile sees are not visited, and blocks that all rows see whole are visited in
a loop without masks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .call import EPSILON

_EPSILON = tl.constexpr(EPSILON)
# Tiles of smaller magnitude are scaled as if they had this one, whose inverse is finite.
_SMALLEST = tl.constexpr(1e-37)


class Operand(NamedTuple):
    """A tensor (batch, head, row, contiguous columns): its pointer and strides in elements."""

    pointer: Any
    batch: int
    head: int
    row: int


class Scores(NamedTuple):
    """What makes t of a score: coefficients (H, P + 1), radius (H,), center (B, H, Tq), each with strides."""

    coefficients: Any
    coefficient_head: int
    coefficient_degree: int
    radius: Any
    radius_head: int
    center: Any
    center_batch: int
    center_head: int
    center_row: int
    scaling: float


class Visibility(NamedTuple):
    """Lengths, window, ranges (B, Tq, 2) and a dense mask (B, H, Tq, Tk); None where there is none."""

    q_len: int
    k_len: int
    window: Any
    ranges: Any
    range_batch: int
    range_row: int
    range_bound: int
    mask: Any
    mask_batch: int
    mask_head: int
    mask_row: int
    mask_key: int


class Dropout(NamedTuple):
    """The seed, the least word (signed) that keeps a weight, and the scale of what is kept."""

    seed: Any
    threshold: int
    scale: float


class Static(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        squarings: log2 of the power.
        monomial: only the highest coefficient counts.
        fold: t is the bare product q·k, and a^P goes with the coefficient to the rows.
        causal, ranged: ranged is 0 without ranges, 1 with one range a batch entry, 2 with one a row.
        q_even, k_even: whether the blocks divide Tq and Tk.
        scaled: operands are float16.
        head_chunks, value_chunks: (first column, width) of the parts that tile D and Dv.
    """

    degree: int
    squarings: int
    normalizer: str
    monomial: bool
    fold: bool
    clamp: bool
    causal: bool
    ranged: int
    q_even: bool
    k_even: bool
    scaled: bool
    precision: str
    head_dim: int
    value_dim: int
    head_chunks: tuple[tuple[int, int], ...]
    value_chunks: tuple[tuple[int, int], ...]
    block_m: int
    block_n: int


# Tiles ------------------------------------------------------------------------------------------------------


@triton.jit
def _base(x, entry, head):
    return x.pointer + entry.to(tl.int64) * x.batch + head.to(tl.int64) * x.head


@triton.jit
def _load(base, stride, start, limit, ROWS: tl.constexpr, CHUNKS: tl.constexpr, DIM: tl.constexpr, EVEN: tl.constexpr):
    """Loads rows start..start + ROWS as one tile for each chunk of columns; zeros beyond the limits."""
    rows = tl.arange(0, ROWS)
    base += tl.cast(start, tl.int64) * stride
    tiles = ()
    for chunk in tl.static_range(len(CHUNKS)):
        columns = CHUNKS[chunk][0] + tl.arange(0, CHUNKS[chunk][1])
        pointers = base + (rows[:, None] * stride + columns[None, :])
        if CHUNKS[chunk][0] + CHUNKS[chunk][1] > DIM:
            inside = columns[None, :] < DIM
            if not EVEN:
                inside &= (start + rows)[:, None] < limit
            tile = tl.load(pointers, mask=inside, other=0.0)
        elif EVEN:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(start + rows)[:, None] < limit, other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _store(tiles, base, stride, start, limit, ROWS: tl.constexpr, CHUNKS: tl.constexpr, DIM: tl.constexpr):
    rows = tl.arange(0, ROWS)
    base += tl.cast(start, tl.int64) * stride
    for chunk in tl.static_range(len(CHUNKS)):
        columns = CHUNKS[chunk][0] + tl.arange(0, CHUNKS[chunk][1])
        pointers = base + (rows[:, None] * stride + columns[None, :])
        mask = ((start + rows)[:, None] < limit) & (columns[None, :] < DIM)
        tl.store(pointers, tiles[chunk].to(base.dtype.element_ty), mask=mask)


@triton.jit
def _zeros(ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    tiles = ()
    for chunk in tl.static_range(len(CHUNKS)):
        tiles = tiles + (tl.zeros((ROWS, CHUNKS[chunk][1]), tl.float32),)
    return tiles


@triton.jit
def _times(tiles, rows, COUNT: tl.constexpr):
    """Multiplies each row of the tiles by a factor."""
    products = ()
    for chunk in tl.static_range(COUNT):
        products = products + (tiles[chunk] * rows[:, None],)
    return products


@triton.jit
def _row_dots(one, other, COUNT: tl.constexpr):
    """Returns the scalar product of each row of two tiles."""
    total = tl.sum(one[0].to(tl.float32) * other[0].to(tl.float32), 1)
    for chunk in tl.static_range(1, COUNT):
        total += tl.sum(one[chunk].to(tl.float32) * other[chunk].to(tl.float32), 1)
    return total


@triton.jit
def _product(one, other, COUNT: tl.constexpr, S: tl.constexpr):
    """Returns one · otherᵀ."""
    product = tl.dot(one[0], tl.trans(other[0]), input_precision=S.precision)
    for chunk in tl.static_range(1, COUNT):
        product = tl.dot(one[chunk], tl.trans(other[chunk]), product, input_precision=S.precision)
    return product


@triton.jit
def _accumulate(sums, weights, tiles, COUNT: tl.constexpr, S: tl.constexpr):
    """Returns sums + weights · tiles."""
    results = ()
    if S.scaled:
        size = tl.maximum(tl.max(tl.abs(weights), 1), _SMALLEST)
        scaled = (weights * (1.0 / size)[:, None]).to(tiles[0].dtype)
        for chunk in tl.static_range(COUNT):
            product = tl.dot(scaled, tiles[chunk], input_precision=S.precision)
            results = results + (sums[chunk] + product * size[:, None],)
    else:
        cast = weights.to(tiles[0].dtype)
        for chunk in tl.static_range(COUNT):
            results = results + (tl.dot(cast, tiles[chunk], sums[chunk], input_precision=S.precision),)
    return results


# The polynomial ---------------------------------------------------------------------------------------------


@triton.jit
def _coefficients(scores, head, S: tl.constexpr):
    """Returns c_0 … c_P of a head (a scalar, or a tensor of heads); of a monomial c_P only."""
    c = ()
    for k in tl.static_range(S.degree if S.monomial else 0, S.degree + 1):
        pointer = scores.coefficients + head * scores.coefficient_head + k * scores.coefficient_degree
        c = c + (tl.load(pointer).to(tl.float32),)
    return c


@triton.jit
def _inverse_radius(scores, head):
    inverse = head * 0.0 + 1.0
    if scores.radius is not None:
        inverse = 1.0 / tl.load(scores.radius + head * scores.radius_head).to(tl.float32)
    return inverse


@triton.jit
def _offset(scores, entry, head, rows, inverse_radius):
    """Returns b_i."""
    offset = rows * 0.0
    if scores.center is not None:
        pointer = scores.center + entry.to(tl.int64) * scores.center_batch + head * scores.center_head
        offset = -inverse_radius * tl.load(pointer + rows * scores.center_row).to(tl.float32)
    return offset


@triton.jit
def _power(t, EXPONENT: tl.constexpr):
    """Returns t^EXPONENT, 0..8, in the fewest multiplies."""
    t2 = t * t
    if EXPONENT == 0:
        result = t * 0.0 + 1.0
    elif EXPONENT == 1:
        result = t
    elif EXPONENT == 2:
        result = t2
    elif EXPONENT == 3:
        result = t2 * t
    elif EXPONENT == 4:
        result = t2 * t2
    elif EXPONENT == 5:
        result = t2 * t2 * t
    elif EXPONENT == 6:
        t3 = t2 * t
        result = t3 * t3
    elif EXPONENT == 7:
        t3 = t2 * t
        result = t3 * t3 * t
    else:
        t4 = t2 * t2
        result = t4 * t4
    return result


@triton.jit
def _argument(x, a, b, scores, S: tl.constexpr):
    """Returns t of the products x = q·k."""
    if S.fold:
        t = x
    elif scores.center is not None:
        t = x * a + b
    else:
        t = x * a
    if S.clamp:
        t = tl.clamp(t, -1.0, 1.0)
    return t


@triton.jit
def _horner(t, c, S: tl.constexpr):
    p = c[S.degree] * t + c[S.degree - 1]
    for k in tl.static_range(S.degree - 2, -1, -1):
        p = p * t + c[k]
    return p


@triton.jit
def _slopes(c, a, S: tl.constexpr):
    """Returns the coefficients of a·p'(t); of a monomial the factor that rows carry."""
    if S.monomial:
        slopes = (S.degree * c[0] * (_power(a, S.degree) if S.fold else a),)
    else:
        slopes = ()
        for k in tl.static_range(1, S.degree + 1):
            slopes = slopes + (k * a * c[k],)
    return slopes


@triton.jit
def _slope(t, slopes, S: tl.constexpr):
    """Returns a·p'(t)."""
    if S.degree == 1:
        p = t * 0.0 + slopes[0]
    else:
        p = slopes[S.degree - 1] * t + slopes[S.degree - 2]
        for k in tl.static_range(S.degree - 3, -1, -1):
            p = p * t + slopes[k]
    return p


@triton.jit
def _weights(t, c, S: tl.constexpr):
    """Returns w over `_factor`."""
    if S.monomial:
        w = _power(t, S.degree)
        if S.squarings > 0:
            w *= c[0]
    else:
        w = _horner(t, c, S)
    for _ in tl.static_range(S.squarings):
        w *= w
    return w


@triton.jit
def _factor(c, a, S: tl.constexpr):
    """Returns the factor of w that rows carry: the coefficient of a monomial that is not squared, else 1."""
    factor = a * 0.0 + 1.0
    if S.monomial and S.squarings == 0:
        factor = c[0]
        if S.fold:
            factor *= _power(a, S.degree)
    return factor


@triton.jit
def _derivatives(t, c, slopes, S: tl.constexpr):
    """Returns w over `_factor`, dw/dp, and a·dp/dt, of a monomial over its only slope."""
    if S.monomial:
        inner = _power(t, S.degree - 1)
        p = inner * t
        if S.squarings > 0:
            p *= c[0]
    else:
        inner = _slope(t, slopes, S)
        p = _horner(t, c, S)
    w = p
    outer = p
    if S.squarings > 0:
        outer = p * (1 << S.squarings)
        w = p * p
        for _ in tl.static_range(S.squarings - 1):
            outer *= w
            w *= w
    return w, outer, inner


@triton.jit
def _minus_sign(dw, w, delta, S: tl.constexpr):
    """Returns dw − δ sign w for l1, else dw; a w that is a square needs no sign."""
    if S.normalizer == "l1":
        if S.squarings > 0:
            dw -= delta
        else:
            dw -= tl.where(w > 0.0, delta, tl.where(w < 0.0, -delta, 0.0))
    return dw


# Visibility -------------------------------------------------------------------------------------------------


@triton.jit
def _interval(visibility, entry, rows, S: tl.constexpr):
    """Returns low and high: row i sees the keys low <= j < high."""
    low = rows * 0
    high = low + visibility.k_len
    if visibility.ranges is not None:
        pointers = visibility.ranges + entry.to(tl.int64) * visibility.range_batch + rows * visibility.range_row
        low = tl.maximum(low, tl.load(pointers))
        high = tl.minimum(high, tl.load(pointers + visibility.range_bound))
    if S.causal:
        high = tl.minimum(high, rows + 1)
    if visibility.window is not None:
        low = tl.maximum(low, rows - visibility.window + 1)
        high = tl.minimum(high, rows + visibility.window)
    return low, high


@triton.jit
def _mask_rows(visibility, entry, head, rows):
    """Returns the pointers to the mask's rows, 0 without a mask."""
    pointers = rows
    if visibility.mask is not None:
        base = visibility.mask + entry.to(tl.int64) * visibility.mask_batch
        pointers = base + head * visibility.mask_head + rows.to(tl.int64) * visibility.mask_row
    return pointers


@triton.jit
def _visible(low, high, mask_rows, columns, visibility):
    visible = (columns >= low) & (columns < high)
    if visibility.mask is not None:
        visible &= tl.load(mask_rows + columns * visibility.mask_key, mask=visible, other=0) != 0
    return visible


@triton.jit
def _key_blocks(low, high, visibility, S: tl.constexpr):
    """Returns the keys that some row sees, [begin, end), and whole blocks that all rows see whole, [whole, stop)."""
    begin = tl.maximum(tl.min(low, 0), 0) // S.block_n * S.block_n
    end = tl.minimum(tl.max(high, 0), visibility.k_len)
    whole = tl.cdiv(tl.maximum(tl.max(low, 0), 0), S.block_n) * S.block_n
    whole = tl.maximum(tl.minimum(whole, tl.cdiv(end, S.block_n) * S.block_n), begin)
    stop = tl.maximum(tl.min(high, 0) // S.block_n * S.block_n, whole)
    if visibility.mask is not None:
        stop = whole
    return begin, end, whole, stop


@triton.jit
def _row_scale(low, high, S: tl.constexpr):
    """Returns r_i of rows without a dense mask."""
    n = tl.maximum(high - low, 1).to(tl.float32)
    if S.normalizer == "rsqrt":
        scale = 1.0 / tl.sqrt_rn(n)
    elif S.normalizer == "mean":
        scale = 1.0 / n
    else:
        scale = n * 0.0 + 1.0
    return scale


@triton.jit
def _total_scale(total, S: tl.constexpr):
    """Returns r_i of the row sum of |w|, or of the number of visible keys."""
    if S.normalizer == "l1":
        scale = tl.where(total > 0.0, 1.0 / (_EPSILON + total), 0.0)
    elif S.normalizer == "rsqrt":
        scale = 1.0 / tl.sqrt_rn(tl.maximum(total, 1.0))
    elif S.normalizer == "mean":
        scale = 1.0 / tl.maximum(total, 1.0)
    else:
        scale = total * 0.0 + 1.0
    return scale


# Dropout, as in dropout.py ----------------------------------------------------------------------------------


@triton.jit
def _mix(word):
    word ^= word >> 16
    word *= 0x85EBCA6B
    word ^= word >> 13
    word *= 0xC2B2AE35
    word ^= word >> 16
    return word


@triton.jit
def _row_words(dropout, visibility, entry, head, heads, rows):
    words = rows
    if dropout is not None:
        numbers = (entry.to(tl.int64) * heads + head) * visibility.q_len + rows
        words = (numbers ^ (numbers >> 32)).to(tl.uint32) ^ _mix(tl.load(dropout.seed).to(tl.uint32))
        words = _mix(words)
    return words


@triton.jit
def _drop(weights, row_words, columns, dropout):
    """Zeroes what is dropped. What is kept is scaled with the rows."""
    if dropout is not None:
        words = _mix(row_words + columns.to(tl.uint32) * 0x9E3779B9).to(tl.int32, bitcast=True)
        weights = tl.where(words >= dropout.threshold, weights, 0.0)
    return weights


@triton.jit
def _keep_scale(dropout):
    scale = 1.0
    if dropout is not None:
        scale = dropout.scale
    return scale


# Forward ----------------------------------------------------------------------------------------------------


@triton.jit
def _program(length, heads, BLOCK: tl.constexpr):
    """Returns the block of rows, the head and the batch entry of this program."""
    blocks = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    return program % blocks, program // blocks % heads, program // blocks // heads


@triton.jit
def _forward_block(
    sums, total, start, q, key, value, a, b, c, low, high, mask_rows, words, scores, visibility, dropout,
    MASKED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Adds the keys start..start + block_n to the sums of w·v and |w|."""
    even: tl.constexpr = S.k_even or not MASKED
    k = _load(key[0], key[1], start, visibility.k_len, S.block_n, S.head_chunks, S.head_dim, even)
    t = _argument(_product(q, k, len(S.head_chunks), S), a, b, scores, S)
    w = _weights(t, c, S)
    columns = (start + tl.arange(0, S.block_n))[None, :]
    if MASKED:
        w = tl.where(_visible(low, high, mask_rows, columns, visibility), w, 0.0)
    if S.normalizer == "l1":
        total += tl.sum(w if S.squarings > 0 else tl.abs(w), 1)
    w = _drop(w, words, columns, dropout)
    v = _load(value[0], value[1], start, visibility.k_len, S.block_n, S.value_chunks, S.value_dim, even)
    return _accumulate(sums, w, v, len(S.value_chunks), S), total


@triton.jit
def forward_kernel(
    query, key, value, out, row_scale, scores, visibility, dropout, heads, repeats, S: tl.constexpr
):  # fmt: skip
    """Computes block_m rows of the output of one head.

    Grid: blocks of query rows × heads × batch, in one dimension. Reads q once and k and v of all visible blocks;
    with a dense mask reads r_i, for l1 writes it.
    """
    block, head, entry = _program(visibility.q_len, heads, S.block_m)
    if S.causal:  # the longest rows first
        block = tl.cdiv(visibility.q_len, S.block_m) - 1 - block
    first = block * S.block_m
    rows = tl.minimum(first + tl.arange(0, S.block_m), visibility.q_len - 1)
    low, high = _interval(visibility, entry, rows, S)
    mask_rows = _mask_rows(visibility, entry, head, rows)[:, None]
    words = _row_words(dropout, visibility, entry, head, heads, rows)[:, None]
    c = _coefficients(scores, head, S)
    inverse_radius = _inverse_radius(scores, head)
    a = scores.scaling * inverse_radius
    b = _offset(scores, entry, head, rows, inverse_radius)[:, None]

    q = _load(
        _base(query, entry, head), query.row, first, visibility.q_len, S.block_m, S.head_chunks, S.head_dim, S.q_even
    )
    k = (_base(key, entry, head // repeats), key.row)
    v = (_base(value, entry, head // repeats), value.row)
    sums = _zeros(S.block_m, S.value_chunks)
    total = tl.zeros((S.block_m,), tl.float32)
    begin, end, whole, stop = _key_blocks(low, high, visibility, S)
    for start in tl.range(whole, stop, S.block_n):
        sums, total = _forward_block(
            sums, total, start, q, k, v, a, b, c, low[:, None], high[:, None], mask_rows, words, scores, visibility,
            dropout, False, S,
        )  # fmt: skip
    if S.causal or S.ranged > 0 or visibility.window is not None or visibility.mask is not None or not S.k_even:
        for start in tl.range(begin, end - (stop - whole), S.block_n):
            at = start + tl.where(start >= whole, stop - whole, 0)
            sums, total = _forward_block(
                sums, total, at, q, k, v, a, b, c, low[:, None], high[:, None], mask_rows, words, scores,
                visibility, dropout, True, S,
            )  # fmt: skip

    factor = _factor(c, a, S)
    scales = (entry.to(tl.int64) * heads + head) * visibility.q_len + rows
    if S.normalizer == "l1":
        scale = _total_scale(total * tl.abs(factor), S)
        tl.store(row_scale + scales, scale, mask=first + tl.arange(0, S.block_m) < visibility.q_len)
    elif visibility.mask is not None:
        scale = tl.load(row_scale + scales)
    else:
        scale = _row_scale(low, high, S)
    sums = _times(sums, scale * factor * _keep_scale(dropout), len(S.value_chunks))
    _store(
        sums, _base(out, entry, head), out.row, first, visibility.q_len, S.block_m, S.value_chunks, S.value_dim
    )  # fmt: skip


@triton.jit
def count_kernel(row_scale, visibility, heads, S: tl.constexpr):
    """Writes r_i of block_m rows of one head under a dense mask. Grid: as `forward_kernel`."""
    block, head, entry = _program(visibility.q_len, heads, S.block_m)
    rows = tl.minimum(block * S.block_m + tl.arange(0, S.block_m), visibility.q_len - 1)
    low, high = _interval(visibility, entry, rows, S)
    mask_rows = _mask_rows(visibility, entry, head, rows)[:, None]
    begin, end, _, _ = _key_blocks(low, high, visibility, S)
    n = tl.zeros((S.block_m,), tl.int32)
    for start in tl.range(begin, end, S.block_n):
        columns = (start + tl.arange(0, S.block_n))[None, :]
        n += tl.sum(_visible(low[:, None], high[:, None], mask_rows, columns, visibility).to(tl.int32), 1)
    scales = (entry.to(tl.int64) * heads + head) * visibility.q_len + rows
    tl.store(row_scale + scales, _total_scale(n.to(tl.float32), S))


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
    split, group, entry = _program(splits, groups, 1)
    lines = tl.arange(0, S.block_m)
    used = lines < repeats * visibility.q_len
    head = group * repeats + tl.where(used, lines // visibility.q_len, 0)
    rows = tl.where(used, lines % visibility.q_len, 0)
    low, high = _interval(visibility, entry, rows, S)
    low = tl.maximum(low, split * split_keys)
    high = tl.minimum(high, (split + 1) * split_keys)
    mask_rows = _mask_rows(visibility, entry, head, rows)[:, None]
    words = _row_words(dropout, visibility, entry, head, heads, rows)[:, None]
    c = _coefficients(scores, head[:, None], S)
    inverse_radius = _inverse_radius(scores, head)
    a = (scores.scaling * inverse_radius)[:, None]
    b = _offset(scores, entry, head, rows, inverse_radius)[:, None]

    q = ()
    starts = query.pointer + entry.to(tl.int64) * query.batch + head.to(tl.int64) * query.head + rows * query.row
    for chunk in tl.static_range(len(S.head_chunks)):
        columns = S.head_chunks[chunk][0] + tl.arange(0, S.head_chunks[chunk][1])[None, :]
        q = q + (tl.load(starts[:, None] + columns, mask=used[:, None] & (columns < S.head_dim), other=0.0),)
    k = (_base(key, entry, group), key.row)
    v = (_base(value, entry, group), value.row)
    sums = _zeros(S.block_m, S.value_chunks)
    total = tl.zeros((S.block_m,), tl.float32)
    begin, end, _, _ = _key_blocks(low, high, visibility, S)
    for start in tl.range(begin, end, S.block_n):
        sums, total = _forward_block(
            sums, total, start, q, k, v, a, b, c, low[:, None], high[:, None], mask_rows, words, scores, visibility,
            dropout, True, S,
        )  # fmt: skip
        if S.normalizer == "rsqrt" or S.normalizer == "mean":
            keys = (start + tl.arange(0, S.block_n))[None, :]
            visible = _visible(low[:, None], high[:, None], mask_rows, keys, visibility)
            total += tl.sum(visible.to(tl.float32), 1)

    factor = tl.reshape(_factor(c, a, S), (S.block_m,))
    if S.normalizer == "l1":
        total *= tl.abs(factor)
    part = tl.program_id(0).to(tl.int64)  # entry, group, split in this order, split the fastest
    part = (entry.to(tl.int64) * groups + group) * splits + split
    tl.store(totals + part * S.block_m + lines, total)
    sums = _times(sums, factor * _keep_scale(dropout), len(S.value_chunks))
    _store(
        sums, partial + part * S.block_m * S.value_dim, S.value_dim, 0, S.block_m, S.block_m, S.value_chunks,
        S.value_dim,
    )  # fmt: skip


@triton.jit
def decode_sum_kernel(partial, totals, out, row_scale, q_len, heads, repeats, splits, S: tl.constexpr):
    """Adds the parts of one output row in order and scales it. Grid: query rows × heads × batch."""
    row, head, entry = _program(q_len, heads, 1)
    line = head % repeats * q_len + row
    part = (entry.to(tl.int64) * (heads // repeats) + head // repeats) * splits
    total = 0.0
    sums = _zeros(1, S.value_chunks)
    for split in tl.range(splits):
        at = (part + split) * S.block_m + line
        total += tl.load(totals + at)
        tiles = _load(partial + at * S.value_dim, S.value_dim, 0, 1, 1, S.value_chunks, S.value_dim, True)
        added = ()
        for chunk in tl.static_range(len(S.value_chunks)):
            added = added + (sums[chunk] + tiles[chunk],)
        sums = added
    scale = _total_scale(total, S)
    if S.normalizer == "l1":
        tl.store(row_scale + (entry.to(tl.int64) * heads + head) * q_len + row, scale)
    sums = _times(sums, tl.zeros((1,), tl.float32) + scale, len(S.value_chunks))
    _store(sums, _base(out, entry, head), out.row, row, q_len, 1, S.value_chunks, S.value_dim)


# Backward ---------------------------------------------------------------------------------------------------


@triton.jit
def _delta_block(
    total, start, q, do, key, value, a, b, c, low, high, mask_rows, words, scores, visibility, dropout,
    MASKED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Adds the keys start..start + block_n to the sum of w·g."""
    even: tl.constexpr = S.k_even or not MASKED
    k = _load(key[0], key[1], start, visibility.k_len, S.block_n, S.head_chunks, S.head_dim, even)
    v = _load(value[0], value[1], start, visibility.k_len, S.block_n, S.value_chunks, S.value_dim, even)
    w = _weights(_argument(_product(q, k, len(S.head_chunks), S), a, b, scores, S), c, S)
    columns = (start + tl.arange(0, S.block_n))[None, :]
    if MASKED:
        w = tl.where(_visible(low, high, mask_rows, columns, visibility), w, 0.0)
    w = _drop(w, words, columns, dropout)
    return total + tl.sum(w * _product(do, v, len(S.value_chunks), S), 1)


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
    block, head, entry = _program(visibility.q_len, heads, S.block_m)
    if S.causal:
        block = tl.cdiv(visibility.q_len, S.block_m) - 1 - block
    first = block * S.block_m
    rows = tl.minimum(first + tl.arange(0, S.block_m), visibility.q_len - 1)
    c = _coefficients(scores, head, S)
    inverse_radius = _inverse_radius(scores, head)
    a = scores.scaling * inverse_radius
    factor = _factor(c, a, S)
    scales = (entry.to(tl.int64) * heads + head) * visibility.q_len + rows
    do = _load(
        _base(grad_out, entry, head), grad_out.row, first, visibility.q_len, S.block_m, S.value_chunks, S.value_dim,
        S.q_even,
    )  # fmt: skip
    if EXACT:
        low, high = _interval(visibility, entry, rows, S)
        mask_rows = _mask_rows(visibility, entry, head, rows)[:, None]
        words = _row_words(dropout, visibility, entry, head, heads, rows)[:, None]
        b = _offset(scores, entry, head, rows, inverse_radius)[:, None]
        q = _load(
            _base(query, entry, head), query.row, first, visibility.q_len, S.block_m, S.head_chunks, S.head_dim,
            S.q_even,
        )  # fmt: skip
        k = (_base(key, entry, head // repeats), key.row)
        v = (_base(value, entry, head // repeats), value.row)
        total = tl.zeros((S.block_m,), tl.float32)
        begin, end, whole, stop = _key_blocks(low, high, visibility, S)
        for start in tl.range(whole, stop, S.block_n):
            total = _delta_block(
                total, start, q, do, k, v, a, b, c, low[:, None], high[:, None], mask_rows, words, scores,
                visibility, dropout, False, S,
            )  # fmt: skip
        if S.causal or S.ranged > 0 or visibility.window is not None or visibility.mask is not None or not S.k_even:
            for start in tl.range(begin, end - (stop - whole), S.block_n):
                at = start + tl.where(start >= whole, stop - whole, 0)
                total = _delta_block(
                    total, at, q, do, k, v, a, b, c, low[:, None], high[:, None], mask_rows, words, scores,
                    visibility, dropout, True, S,
                )  # fmt: skip
        total *= tl.load(row_scale + scales) * tl.abs(factor)
    else:
        o = _load(
            _base(out, entry, head), out.row, first, visibility.q_len, S.block_m, S.value_chunks, S.value_dim, S.q_even
        )
        total = _row_dots(do, o, len(S.value_chunks)) * tl.where(factor < 0.0, -1.0, 1.0) / _keep_scale(dropout)
    tl.store(delta + scales, total, mask=first + tl.arange(0, S.block_m) < visibility.q_len)


@triton.jit
def _grad_query_block(
    sums, moments, shift, start, q, do, key, value, a, b, c, slopes, delta, low, high, mask_rows, words, scores, visibility,
    dropout, MOMENTS: tl.constexpr, SHIFT: tl.constexpr, MASKED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Adds the keys start..start + block_n to the sums of dt·k, dp·t^k and dt."""
    even: tl.constexpr = S.k_even or not MASKED
    k = _load(key[0], key[1], start, visibility.k_len, S.block_n, S.head_chunks, S.head_dim, even)
    v = _load(value[0], value[1], start, visibility.k_len, S.block_n, S.value_chunks, S.value_dim, even)
    t = _argument(_product(q, k, len(S.head_chunks), S), a, b, scores, S)
    dw = _product(do, v, len(S.value_chunks), S)
    columns = (start + tl.arange(0, S.block_n))[None, :]
    if MASKED:  # t too: what is hidden may overflow
        visible = _visible(low, high, mask_rows, columns, visibility)
        t = tl.where(visible, t, 0.0)
    w, outer, inner = _derivatives(t, c, slopes, S)
    dw = _minus_sign(_drop(dw, words, columns, dropout), w, delta, S)
    if MASKED:
        dw = tl.where(visible, dw, 0.0)
    if S.squarings > 0:
        dw *= outer
    dt = dw * inner

    if MOMENTS and S.monomial:
        moments = (moments[0] + tl.sum(dt * t, 1),)
    elif MOMENTS:
        added = ()
        for k_power in tl.static_range(S.degree + 1):
            added = added + (moments[k_power] + tl.sum(dw, 1),)
            dw *= t
        moments = added
    if S.clamp:
        dt = tl.where(tl.abs(t) < 1.0, dt, 0.0)
    if SHIFT:
        shift += tl.sum(dt, 1)
    return _accumulate(sums, dt, k, len(S.head_chunks), S), moments, shift


@triton.jit
def grad_query_kernel(
    query, key, value, grad_out, grad_query, row_scale, delta, partial_moments, grad_center, scores, visibility,
    dropout, heads, repeats, MOMENTS: tl.constexpr, SHIFT: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Computes dQ of block_m rows of one head, and what else sums over the keys of a row.

    Grid: as `forward_kernel`. With MOMENTS writes the coefficients' gradient over these rows (B, H, blocks, P + 1;
    of a monomial only c_P's), with SHIFT the center's (B, H, Tq). Sums are float32.
    """
    block, head, entry = _program(visibility.q_len, heads, S.block_m)
    if S.causal:
        block = tl.cdiv(visibility.q_len, S.block_m) - 1 - block
    first = block * S.block_m
    rows = tl.minimum(first + tl.arange(0, S.block_m), visibility.q_len - 1)
    low, high = _interval(visibility, entry, rows, S)
    mask_rows = _mask_rows(visibility, entry, head, rows)[:, None]
    words = _row_words(dropout, visibility, entry, head, heads, rows)[:, None]
    c = _coefficients(scores, head, S)
    inverse_radius = _inverse_radius(scores, head)
    a = scores.scaling * inverse_radius
    b = _offset(scores, entry, head, rows, inverse_radius)[:, None]
    slopes = _slopes(c, a, S)

    q = _load(
        _base(query, entry, head), query.row, first, visibility.q_len, S.block_m, S.head_chunks, S.head_dim, S.q_even
    )
    do = _load(
        _base(grad_out, entry, head), grad_out.row, first, visibility.q_len, S.block_m, S.value_chunks, S.value_dim,
        S.q_even,
    )  # fmt: skip
    scales = (entry.to(tl.int64) * heads + head) * visibility.q_len + rows
    delta_rows = tl.zeros((S.block_m, 1), tl.float32)
    if S.normalizer == "l1":
        inside = first + tl.arange(0, S.block_m) < visibility.q_len
        delta_rows = tl.load(delta + scales, mask=inside, other=0.0)[:, None]

    k = (_base(key, entry, head // repeats), key.row)
    v = (_base(value, entry, head // repeats), value.row)
    sums = _zeros(S.block_m, S.head_chunks)
    shift = tl.zeros((S.block_m,), tl.float32)
    moments = ()
    if MOMENTS:
        for _ in tl.static_range(1 if S.monomial else S.degree + 1):
            moments = moments + (tl.zeros((S.block_m,), tl.float32),)
    begin, end, whole, stop = _key_blocks(low, high, visibility, S)
    for start in tl.range(whole, stop, S.block_n):
        sums, moments, shift = _grad_query_block(
            sums, moments, shift, start, q, do, k, v, a, b, c, slopes, delta_rows, low[:, None],
            high[:, None], mask_rows, words, scores, visibility, dropout, MOMENTS, SHIFT, False, S,
        )  # fmt: skip
    if S.causal or S.ranged > 0 or visibility.window is not None or visibility.mask is not None or not S.k_even:
        for start in tl.range(begin, end - (stop - whole), S.block_n):
            at = start + tl.where(start >= whole, stop - whole, 0)
            sums, moments, shift = _grad_query_block(
                sums, moments, shift, at, q, do, k, v, a, b, c, slopes, delta_rows, low[:, None],
                high[:, None], mask_rows, words, scores, visibility, dropout, MOMENTS, SHIFT, True, S,
            )  # fmt: skip

    if S.normalizer == "l1" or visibility.mask is not None:
        scale = tl.load(row_scale + scales)
    else:
        scale = _row_scale(low, high, S)
    scale *= _keep_scale(dropout)
    if S.monomial:
        slope_scale = scale * slopes[0]
    else:
        slope_scale = scale
    _store(
        _times(sums, slope_scale, len(S.head_chunks)), _base(grad_query, entry, head), grad_query.row, first,
        visibility.q_len, S.block_m, S.head_chunks, S.head_dim,
    )  # fmt: skip
    if SHIFT:
        inside = first + tl.arange(0, S.block_m) < visibility.q_len
        tl.store(grad_center + scales, shift * slope_scale * (-1.0 / scores.scaling), mask=inside)
    if MOMENTS:
        blocks = tl.cdiv(visibility.q_len, S.block_m)
        part = (entry.to(tl.int64) * heads + head) * blocks + block
        for k_power in tl.static_range(len(moments)):
            moment = tl.sum(moments[k_power] * scale, 0)
            if S.fold:
                moment *= _power(a, S.degree)
            tl.store(partial_moments + part * len(moments) + k_power, moment)


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
            low, high = _interval(visibility, entry, rows, S)
            seen = (tl.maximum(low, first_key) <= tl.minimum(high - 1, last_key))
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
def _grad_key_value_block(
    key_sums, value_sums, start, k, v, query, grad_out, row_scale, delta, scales, a, c, slopes, inverse_radius, first_key,
    entry, head, heads, scores, visibility, dropout, MASKED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Adds the query rows start..start + block_m of one head to the sums of dS·q and r w·dO."""
    q = _load(query[0], query[1], start, visibility.q_len, S.block_m, S.head_chunks, S.head_dim, S.q_even)
    do = _load(grad_out[0], grad_out[1], start, visibility.q_len, S.block_m, S.value_chunks, S.value_dim, S.q_even)
    rows = tl.minimum(start + tl.arange(0, S.block_m), visibility.q_len - 1)
    columns = (first_key + tl.arange(0, S.block_n))[:, None]
    low, high = _interval(visibility, entry, rows, S)
    b = _offset(scores, entry, head, rows, inverse_radius)[None, :]
    if S.normalizer == "l1" or visibility.mask is not None:
        scale = tl.load(row_scale + scales + rows)
    else:
        scale = _row_scale(low, high, S)
    scale = (scale * _keep_scale(dropout))[None, :]
    row_delta = scale
    if S.normalizer == "l1":
        row_delta = tl.load(delta + scales + rows)[None, :]

    t = _argument(_product(k, q, len(S.head_chunks), S), a, b, scores, S)
    if MASKED:
        mask_rows = _mask_rows(visibility, entry, head, rows)[None, :]
        visible = _visible(low[None, :], high[None, :], mask_rows, columns, visibility)
        t = tl.where(visible, t, 0.0)
    w, outer, slope = _derivatives(t, c, slopes, S)
    if S.squarings > 0:
        slope *= outer
    if S.clamp:
        slope = tl.where(tl.abs(t) < 1.0, slope, 0.0)
    if MASKED:
        w = tl.where(visible, w, 0.0)
        slope = tl.where(visible, slope, 0.0)
    if S.fold:  # r c a^P goes with x^(P−1), which makes both w and dt; P remains for the end
        slope *= scale * _factor(c, a, S)
        weights = slope * t
    elif S.monomial:
        slope *= scale * slopes[0]
        weights = w * (scale * _factor(c, a, S))
    else:
        slope *= scale
        weights = w * scale
    words = _row_words(dropout, visibility, entry, head, heads, rows)[None, :]
    value_sums = _accumulate(value_sums, _drop(weights, words, columns, dropout), do, len(S.value_chunks), S)

    # Only now, so that fewer tiles are alive at a time.
    dw = _product(v, do, len(S.value_chunks), S)
    dt = _minus_sign(_drop(dw, words, columns, dropout), w, row_delta, S) * slope
    key_sums = _accumulate(key_sums, dt, q, len(S.head_chunks), S)
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
    block, group, entry = _program(visibility.k_len, heads // repeats, S.block_n)
    first_key = block * S.block_n
    last_key = tl.minimum(first_key + S.block_n, visibility.k_len) - 1
    k = _load(
        _base(key, entry, group), key.row, first_key, visibility.k_len, S.block_n, S.head_chunks, S.head_dim, S.k_even
    )
    v = _load(
        _base(value, entry, group), value.row, first_key, visibility.k_len, S.block_n, S.value_chunks, S.value_dim,
        S.k_even,
    )  # fmt: skip
    key_sums = _zeros(S.block_n, S.head_chunks)
    value_sums = _zeros(S.block_n, S.value_chunks)
    begin, end, whole, stop = _query_blocks(visibility, entry, first_key, last_key, S)
    for repeat in tl.range(repeats):
        head = group * repeats + repeat
        c = _coefficients(scores, head, S)
        inverse_radius = _inverse_radius(scores, head)
        a = scores.scaling * inverse_radius
        slopes = _slopes(c, a, S)
        q = (_base(query, entry, head), query.row)
        do = (_base(grad_out, entry, head), grad_out.row)
        scales = (entry.to(tl.int64) * heads + head) * visibility.q_len
        for start in tl.range(whole, stop, S.block_m):
            key_sums, value_sums = _grad_key_value_block(
                key_sums, value_sums, start, k, v, q, do, row_scale, delta, scales, a, c, slopes, inverse_radius,
                first_key, entry, head, heads, scores, visibility, dropout, False, S,
            )  # fmt: skip
        if S.causal or S.ranged > 0 or visibility.window is not None or visibility.mask is not None:
            for start in tl.range(begin, end - (stop - whole), S.block_m):
                at = start + tl.where(start >= whole, stop - whole, 0)
                key_sums, value_sums = _grad_key_value_block(
                    key_sums, value_sums, at, k, v, q, do, row_scale, delta, scales, a, c, slopes,
                    inverse_radius, first_key, entry, head, heads, scores, visibility, dropout, True, S,
                )  # fmt: skip
    if S.fold:
        key_sums = _times(key_sums, tl.zeros((S.block_n,), tl.float32) + S.degree, len(S.head_chunks))
    _store(
        key_sums, _base(grad_key, entry, group), grad_key.row, first_key, visibility.k_len, S.block_n, S.head_chunks,
        S.head_dim,
    )  # fmt: skip
    _store(
        value_sums, _base(grad_value, entry, group), grad_value.row, first_key, visibility.k_len, S.block_n,
        S.value_chunks, S.value_dim,
    )  # fmt: skip
