"""Dropout in the Triton kernels, as in `ops/dropout.py`: each weight's fate is hashed from (seed, row, key)."""

from __future__ import annotations

import triton
import triton.language as tl


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
