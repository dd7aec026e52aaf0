"""What the kernels of backend `triton` share. No exponential and no running maximum: partial sums only add.

    t_ij = a · q_i·k_j + b_i                      a = scaling / radius, b_i = −center_i / radius; may be clamped
    w_ij = m_ij · p(t_ij)^s                       out_i = r_i Σ_j w_ij v_j
    dw   = g − δ_i sign w                         g_ij = dO_i·v_j; δ_i = dO_i·O_i for l1, else 0
    dp   = dw · s p^(s−1)                         dc_k = Σ r_i dp t^k
    dt   = dp · p'(t)                             dcenter_i = −r_i Σ_j dt / radius, dQ_i = r_i a Σ_j dt k_j

Scores, polynomials and sums are float32. Factors of whole rows (r, and for a monomial its coefficient) are applied
once to the accumulated row where the kernel's rows are queries. w and dt are cast to the operands' dtype last, for
the second matrix product; in float16 each row is divided before by its largest magnitude so far, and its sums with it,
so that neither a w of e^-80 nor a score of 1e3 cubed leaves the range.

Which keys a query row sees is an interval [low, high), from `causal`, `window` and `ranges` together, and a dense
mask on top. Key blocks that no row of a tile sees are not visited, and blocks that all rows see whole are visited in
a loop without masks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..call import EPSILON

_EPSILON = tl.constexpr(EPSILON)
# A row of smaller magnitude is divided by this one, whose inverse is finite.
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
    """What a kernel is compiled for. Triton 3.6 takes no field for a constant in a shape or a static_range before it
    has a name of its own (`degree: tl.constexpr = S.degree`), or is an argument.

    Attributes:
        squarings: log2 of the power.
        monomial: only the highest coefficient counts.
        fold: t is the bare product q·k, and a^P goes with the coefficient to the rows.
        causal, ranged: ranged is 0 without ranges, 1 with one range a batch entry, 2 with one a row.
        q_even, k_even: whether the blocks divide Tq and Tk.
        scaled: operands are float16.
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
    block_m: int
    block_n: int


# Tiles ------------------------------------------------------------------------------------------------------
# Columns are tiled by one or two chunks, whose widths are powers of 2 from 16: 80 = 64 + 16. Rows of a head are a
# tuple of tiles, one for each chunk.


@triton.constexpr_function
def chunk_width(dim, chunk):
    """Returns the width of the first (0) or the second (1) chunk that tiles `dim` columns; 0 if there is none."""
    first = max(16, 1 << (dim.bit_length() - 1))
    rest = max(16, 1 << (dim - first - 1).bit_length()) if dim > first else 0
    widths = (2 * first, 0) if rest == first else (first, rest)
    return widths[chunk]


@triton.constexpr_function
def chunk_start(dim, chunk):
    """Returns the first column of a chunk."""
    return 0 if chunk == 0 else chunk_width(dim, 0)


@triton.constexpr_function
def count_chunks(dim):
    """Returns how many chunks tile `dim` columns."""
    return 1 if chunk_width(dim, 1) == 0 else 2


@triton.jit
def locate(x, entry, head):
    """Returns the pointer to the rows of an operand's head."""
    return x.pointer + entry.to(tl.int64) * x.batch + head.to(tl.int64) * x.head


@triton.jit
def load_rows(base, stride, start, limit, ROWS: tl.constexpr, DIM: tl.constexpr, EVEN: tl.constexpr):
    """Loads rows start..start + ROWS as one tile for each chunk of columns; zeros beyond the limits."""
    rows = tl.arange(0, ROWS)
    base += tl.cast(start, tl.int64) * stride
    tiles = ()
    for chunk in tl.static_range(count_chunks(DIM)):
        columns = chunk_start(DIM, chunk) + tl.arange(0, chunk_width(DIM, chunk))
        pointers = base + (rows[:, None] * stride + columns[None, :])
        if chunk_start(DIM, chunk) + chunk_width(DIM, chunk) > DIM:
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
def store_rows(tiles, base, stride, start, limit, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Stores one tile for each chunk of columns in the rows from start, inside the limits."""
    rows = tl.arange(0, ROWS)
    base += tl.cast(start, tl.int64) * stride
    for chunk in tl.static_range(count_chunks(DIM)):
        columns = chunk_start(DIM, chunk) + tl.arange(0, chunk_width(DIM, chunk))
        pointers = base + (rows[:, None] * stride + columns[None, :])
        mask = ((start + rows)[:, None] < limit) & (columns[None, :] < DIM)
        tl.store(pointers, tiles[chunk].to(base.dtype.element_ty), mask=mask)


@triton.jit
def zero_rows(ROWS: tl.constexpr):
    """Returns a float32 zero for each row."""
    return tl.zeros((ROWS,), tl.float32)


@triton.jit
def new_sums(ROWS: tl.constexpr, DIM: tl.constexpr, S: tl.constexpr):
    """Returns sums of rows, a tile for each chunk; in float16 and what each row is divided by."""
    tiles = ()
    for chunk in tl.static_range(count_chunks(DIM)):
        tiles = tiles + (tl.zeros((ROWS, chunk_width(DIM, chunk)), tl.float32),)
    if S.scaled:
        tiles = tiles + (zero_rows(ROWS) + _SMALLEST,)
    return tiles


@triton.jit
def finish_rows(sums, rows, S: tl.constexpr):
    """Returns the tiles of the sums with each row multiplied by a factor."""
    count: tl.constexpr = len(sums) - S.scaled
    if S.scaled:
        rows *= sums[count]
    products = ()
    for chunk in tl.static_range(count):
        products = products + (sums[chunk] * rows[:, None],)
    return products


@triton.jit
def dot_rows(one, other):
    """Returns the scalar product of each row of two tiles."""
    total = tl.sum(one[0].to(tl.float32) * other[0].to(tl.float32), 1)
    for chunk in tl.static_range(1, len(one)):
        total += tl.sum(one[chunk].to(tl.float32) * other[chunk].to(tl.float32), 1)
    return total


@triton.jit
def multiply_transposed(one, other, S: tl.constexpr):
    """Returns one · otherᵀ."""
    product = tl.dot(one[0], tl.trans(other[0]), input_precision=S.precision)
    for chunk in tl.static_range(1, len(one)):
        product = tl.dot(one[chunk], tl.trans(other[chunk]), product, input_precision=S.precision)
    return product


@triton.jit
def accumulate(sums, weights, tiles, S: tl.constexpr):
    """Returns sums + weights · tiles."""
    if S.scaled:
        size = tl.maximum(tl.max(tl.abs(weights), 1), sums[len(tiles)])
        shrink = (sums[len(tiles)] / size)[:, None]
        weights *= (1.0 / size)[:, None]
    cast = weights.to(tiles[0].dtype)
    results = ()
    for chunk in tl.static_range(len(tiles)):
        before = sums[chunk]
        if S.scaled:
            before *= shrink
        results = results + (tl.dot(cast, tiles[chunk], before, input_precision=S.precision),)
    if S.scaled:
        results = results + (size,)
    return results


# The polynomial ---------------------------------------------------------------------------------------------


@triton.jit
def load_coefficients(scores, head, S: tl.constexpr):
    """Returns c_0 … c_P of a head (a scalar, or a tensor of heads); of a monomial c_P only."""
    degree: tl.constexpr = S.degree
    c = ()
    for k in tl.static_range(degree if S.monomial else 0, degree + 1):
        pointer = scores.coefficients + head * scores.coefficient_head + k * scores.coefficient_degree
        c = c + (tl.load(pointer).to(tl.float32),)
    return c


@triton.jit
def load_polynomial(scores, head, S: tl.constexpr):
    """Returns the coefficients of a head, 1 / radius and a."""
    c = load_coefficients(scores, head, S)
    inverse_radius = load_inverse_radius(scores, head)
    return c, inverse_radius, scores.scaling * inverse_radius


@triton.jit
def load_inverse_radius(scores, head):
    """Returns 1 / radius of a head."""
    inverse = head * 0.0 + 1.0
    if scores.radius is not None:
        inverse = 1.0 / tl.load(scores.radius + head * scores.radius_head).to(tl.float32)
    return inverse


@triton.jit
def load_offset(scores, entry, head, rows, inverse_radius):
    """Returns b_i."""
    offset = rows * 0.0
    if scores.center is not None:
        pointer = scores.center + entry.to(tl.int64) * scores.center_batch + head * scores.center_head
        offset = -inverse_radius * tl.load(pointer + rows * scores.center_row).to(tl.float32)
    return offset


@triton.jit
def raise_to(t, EXPONENT: tl.constexpr):
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
def compute_t(x, a, b, scores, S: tl.constexpr):
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
def evaluate_polynomial(t, c, S: tl.constexpr):
    """Returns p(t), by Horner's rule."""
    degree: tl.constexpr = S.degree
    p = c[degree] * t + c[degree - 1]
    for k in tl.static_range(degree - 2, -1, -1):
        p = p * t + c[k]
    return p


@triton.jit
def scale_slopes(c, factor, S: tl.constexpr):
    """Returns the coefficients of factor·p'(t); of a monomial the factor that rows carry."""
    degree: tl.constexpr = S.degree
    if S.monomial:
        slopes = (degree * c[0] * (raise_to(factor, degree) if S.fold else factor),)
    else:
        slopes = ()
        for k in tl.static_range(1, degree + 1):
            slopes = slopes + (k * factor * c[k],)
    return slopes


@triton.jit
def evaluate_slope(t, slopes, S: tl.constexpr):
    """Returns p'(t) with the factor of `scale_slopes`."""
    degree: tl.constexpr = S.degree
    if degree == 1:
        p = t * 0.0 + slopes[0]
    else:
        p = slopes[degree - 1] * t + slopes[degree - 2]
        for k in tl.static_range(degree - 3, -1, -1):
            p = p * t + slopes[k]
    return p


@triton.jit
def compute_weights(t, c, S: tl.constexpr):
    """Returns w over `compute_factor`."""
    squarings: tl.constexpr = S.squarings
    if S.monomial:
        w = raise_to(t, S.degree)
        if squarings > 0:
            w *= c[0]
    else:
        w = evaluate_polynomial(t, c, S)
    for _ in tl.static_range(squarings):
        w *= w
    return w


@triton.jit
def compute_factor(c, a, S: tl.constexpr):
    """Returns the factor of w that rows carry: the coefficient of a monomial that is not squared, else 1."""
    factor = a * 0.0 + 1.0
    if S.monomial and S.squarings == 0:
        factor = c[0]
        if S.fold:
            factor *= raise_to(a, S.degree)
    return factor


@triton.jit
def compute_derivatives(t, c, slopes, S: tl.constexpr):
    """Returns w over `compute_factor`, dw/dp, and dp/dt with the slopes' factor, of a monomial over its only slope."""
    squarings: tl.constexpr = S.squarings
    if S.monomial:
        inner = raise_to(t, S.degree - 1)
        p = inner * t
        if squarings > 0:
            p *= c[0]
    else:
        inner = evaluate_slope(t, slopes, S)
        p = evaluate_polynomial(t, c, S)
    w = p
    outer = p
    if squarings > 0:
        outer = p * (1 << squarings)
        w = p * p
        for _ in tl.static_range(squarings - 1):
            outer *= w
            w *= w
    return w, outer, inner


@triton.jit
def subtract_delta(dw, w, delta, S: tl.constexpr):
    """Returns dw − δ sign w for l1, else dw; a w that is a square needs no sign."""
    if S.normalizer == "l1":
        if S.squarings > 0:
            dw -= delta
        else:
            dw -= tl.where(w > 0.0, delta, tl.where(w < 0.0, -delta, 0.0))
    return dw


# Visibility -------------------------------------------------------------------------------------------------


@triton.jit
def find_interval(visibility, entry, rows, S: tl.constexpr):
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
def locate_mask_rows(visibility, entry, head, rows):
    """Returns the pointers to the mask's rows, 0 without a mask."""
    pointers = rows
    if visibility.mask is not None:
        base = visibility.mask + entry.to(tl.int64) * visibility.mask_batch
        pointers = base + head * visibility.mask_head + rows.to(tl.int64) * visibility.mask_row
    return pointers


@triton.jit
def find_visible(low, high, mask_rows, columns, visibility):
    """Returns m of a tile; rows and columns broadcast, in either orientation."""
    visible = (columns >= low) & (columns < high)
    if visibility.mask is not None:
        visible &= tl.load(mask_rows + columns * visibility.mask_key, mask=visible, other=0) != 0
    return visible


@triton.jit
def find_key_blocks(low, high, visibility, S: tl.constexpr):
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
def scale_by_interval(low, high, S: tl.constexpr):
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
def scale_by_total(total, S: tl.constexpr):
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
def mix(word):
    """Hashes 32-bit words."""
    word ^= word >> 16
    word *= 0x85EBCA6B
    word ^= word >> 13
    word *= 0xC2B2AE35
    word ^= word >> 16
    return word


@triton.jit
def hash_rows(dropout, visibility, entry, head, heads, rows):
    """Returns a word for each query row, from the seed and the number of the row; anything without dropout."""
    words = rows
    if dropout is not None:
        numbers = (entry.to(tl.int64) * heads + head) * visibility.q_len + rows
        words = (numbers ^ (numbers >> 32)).to(tl.uint32) ^ mix(tl.load(dropout.seed).to(tl.uint32))
        words = mix(words)
    return words


@triton.jit
def drop(weights, row_words, columns, dropout):
    """Zeroes what is dropped. What is kept is scaled with the rows."""
    if dropout is not None:
        words = mix(row_words + columns.to(tl.uint32) * 0x9E3779B9).to(tl.int32, bitcast=True)
        weights = tl.where(words >= dropout.threshold, weights, 0.0)
    return weights


@triton.jit
def keep_scale_of(dropout):
    """Returns 1 / (1 − probability), 1 without dropout."""
    scale = 1.0
    if dropout is not None:
        scale = dropout.scale
    return scale


# Programs and loops -----------------------------------------------------------------------------------------


@triton.jit
def locate_program(length, heads, BLOCK: tl.constexpr):
    """Returns the block of rows, the head and the batch entry of this program."""
    blocks = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    return program % blocks, program // blocks % heads, program // blocks // heads


@triton.jit
def locate_query_rows(visibility, heads, S: tl.constexpr):
    """Returns the block of query rows, the head and the batch entry of this program, the longest rows first; its first
    row; its rows, the last for those beyond it; and their places in a contiguous (B, H, Tq).
    """
    block, head, entry = locate_program(visibility.q_len, heads, S.block_m)
    if S.causal:
        block = tl.cdiv(visibility.q_len, S.block_m) - 1 - block
    first = block * S.block_m
    rows = tl.minimum(first + tl.arange(0, S.block_m), visibility.q_len - 1)
    places = (entry.to(tl.int64) * heads + head) * visibility.q_len + rows
    return block, head, entry, first, rows, places


@triton.jit
def look(low, high, visibility, dropout, entry, head, heads, rows):
    """Returns low, high, the mask's rows and the words of dropout as columns, for a tile of query rows."""
    mask_rows = locate_mask_rows(visibility, entry, head, rows)
    words = hash_rows(dropout, visibility, entry, head, heads, rows)
    return low[:, None], high[:, None], mask_rows[:, None], words[:, None]


@triton.jit
def visit_blocks(
    add: tl.constexpr, sums, operands, bounds, visibility, STEP: tl.constexpr, EVEN: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Returns the sums after `add(sums, start, operands, MASKED, S)` of each block within the bounds of
    `find_key_blocks`: first those seen whole, without masks, then the others.
    """
    begin, end, whole, stop = bounds
    for start in tl.range(whole, stop, STEP):
        sums = add(sums, start, operands, False, S)
    if S.causal or S.ranged > 0 or visibility.window is not None or visibility.mask is not None or not EVEN:
        for start in tl.range(begin, end - (stop - whole), STEP):
            sums = add(sums, start + tl.where(start >= whole, stop - whole, 0), operands, True, S)
    return sums
