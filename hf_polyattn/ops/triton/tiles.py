"""What the Triton kernels do with tiles: rows of a head, loaded, multiplied, summed and stored. Sizes are in `tuning`.

Columns are tiled by one or two chunks, whose widths are powers of 2 from 16: 80 = 64 + 16. Rows of a head are a tuple
of tiles, one for each chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A row of smaller magnitude is divided by this one, whose inverse is finite.
_SMALLEST = tl.constexpr(1e-37)


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
