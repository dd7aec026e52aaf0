"""Attention dropout by a counter: the same element is dropped in forward and backward, in every backend.

One 32-bit word per element is hashed from (seed, row, column) with the finalizer of MurmurHash3
(public domain, Austin Appleby), in int64 arithmetic of which the low 32 bits are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _mix(word: Tensor) -> Tensor:
    word = word ^ (word >> 16)
    word = (word * 0x85EBCA6B) & _WORD
    word = word ^ (word >> 13)
    word = (word * 0xC2B2AE35) & _WORD
    return word ^ (word >> 16)


def new_seed(device: torch.device) -> Tensor:
    """Returns a fresh int64 seed of shape (1,), drawn from the default generator of `device`."""
    return torch.randint(0, 2**31 - 1, (1,), device=device, dtype=torch.int64)


def dropout_scale(seed: Tensor, rows: Tensor, columns: Tensor, probability: float) -> Tensor:
    """Returns 0 where an element is dropped and 1/(1 - probability) where it is kept, float32.

    Args:
        seed: int64 (1,).
        rows: int64 (...), the flat number of each query row, (batch * H + head) * Tq + query.
        columns: int64 (Tk), the key numbers.
        probability: of dropping an element, in [0, 1).
    """
    row_words = _mix((rows ^ (rows >> 32)) & _WORD ^ _mix(seed & _WORD))
    words = _mix((row_words.unsqueeze(-1) + columns * 0x9E3779B9) & _WORD)
    keep = words >= int(probability * 2**32)
    return keep.to(torch.float32) / (1.0 - probability)


def row_numbers(batch: range, heads: int, queries: range, q_len: int, device: torch.device) -> Tensor:
    """Returns the flat row numbers of a block, int64 (len(batch), heads, len(queries))."""
    b = torch.arange(batch.start, batch.stop, device=device)[:, None, None]
    h = torch.arange(heads, device=device)[None, :, None]
    i = torch.arange(queries.start, queries.stop, device=device)[None, None, :]
    return (b * heads + h) * q_len + i
