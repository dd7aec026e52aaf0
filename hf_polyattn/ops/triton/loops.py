"""Which rows a program of a Triton kernel owns, and its loops over blocks of keys or queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import hash_rows
from .visibility import locate_mask_rows


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
