"""Which keys a query row sees, and the row scale that follows from it, in the Triton kernels.

A mask or ranges may be a view with any strides: their offsets are 64-bit. A dense mask per head passes 2³¹ elements at
32,768 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..call import EPSILON

_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def find_interval(visibility, entry, rows, S: tl.constexpr):
    """Returns low and high: row i sees the keys low <= j < high."""
    low = rows * 0
    high = low + visibility.k_len
    if visibility.ranges is not None:
        base = visibility.ranges + entry.to(tl.int64) * visibility.range_batch
        pointers = base + rows.to(tl.int64) * visibility.range_row
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
        pointers = base + head.to(tl.int64) * visibility.mask_head + rows.to(tl.int64) * visibility.mask_row
    return pointers


@triton.jit
def find_visible(low, high, mask_rows, columns, visibility):
    """Returns m of a tile; rows and columns broadcast, in either orientation."""
    visible = (columns >= low) & (columns < high)
    if visibility.mask is not None:
        visible &= tl.load(mask_rows + columns.to(tl.int64) * visibility.mask_key, mask=visible, other=0) != 0
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
