"""Attention dropout by a counter: the same element is dropped in forward and backward, in every backend.

One 32-bit word per element is hashed from (seed, row, column) with the finalizer of MurmurHash3
(public domain, Austin Appleby), in int32 arithmetic that wraps around.
"""

from __future__ import annotations

import torch
from torch import Tensor

# 0x85EBCA6B, 0xC2B2AE35 and 0x9E3779B9 as signed words.
_FIRST, _SECOND, _GOLDEN = (word - 2**32 for word in (0x85EBCA6B, 0xC2B2AE35, 0x9E3779B9))


def _mix(word: Tensor) -> Tensor:
    """Hashes int32 words in place; the masks make the shifts logical."""
    word ^= (word >> 16).bitwise_and_(0xFFFF)
    word *= _FIRST
    word ^= (word >> 13).bitwise_and_(0x7FFFF)
    word *= _SECOND
    word ^= (word >> 16).bitwise_and_(0xFFFF)
    return word


def new_seed(device: torch.device) -> Tensor:
    """Returns a fresh int64 seed of shape (1,), drawn from the default generator of `device`."""
    return torch.randint(0, 2**31 - 1, (1,), device=device, dtype=torch.int64)


def dropout_scale(seed: Tensor, rows: Tensor, columns: Tensor, probability: float) -> Tensor:
    """Returns 0 where an element is dropped and 1 / (1 − probability) where it is kept, float32 (..., Tk).

    Args:
        seed: int64 (1,).
        rows: int64 (...), the flat number of each query row, (batch * H + head) * Tq + query.
        columns: int64 (Tk), the key numbers.
        probability: of dropping an element, in [0, 1).
    """
    row_words = _mix((rows ^ (rows >> 32)).to(torch.int32) ^ _mix(seed.to(torch.int32)))
    words = _mix(row_words.unsqueeze(-1) + columns.to(torch.int32) * _GOLDEN)
    kept = words.ge_(int(probability * 2**32) - 2**31)  # in place: a comparison into bool is many times slower
    return kept.to(torch.float32).mul_(1.0 / (1.0 - probability))
