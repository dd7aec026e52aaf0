"""Query rows without what nothing is learned from: padding, and keys that no row sees.

Texts of about one length lie together, whichever of a batch they are, and rows in blocks with the keys that some of
them sees: of padded batches, and of causal rows, that is less than half of all scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..capture import Observation
from .rows import Rows, rows_of

_BLOCK_SCORES = 2**17  # of all heads: half a megabyte, which a core's cache holds
_BLOCK_ROWS = 64  # of an entry, beyond which a block of causal rows has many scores that nobody sees
_FILLED = 0.75  # of the scores of entries that lie together, that are at least theirs
_PATTERN = 2**24  # visible or not, looked at at once


def packed_rows(path: str, seen: Observation, stride: int, first: int = 0) -> Iterator[Rows]:
    """Yields the real ones of every `stride`-th query row, in blocks, with the keys that some row of a block sees.

    Args:
        path: of the attention module.
        seen: by it.
        stride: 1 for all rows.
        first: number of the first batch entry among all that the module sees.

    Raises:
        CalibrationError: scores or outputs that are not finite.
    """
    used = _Used.of(seen, stride)
    heads = seen.query.shape[1]
    for entries in used.groups(heads):
        rows, real = _first_used(used.rows[entries])
        keys, known = _first_used(used.keys[entries])
        at = entries[:, None]
        visible = used.visible.expand(len(used.rows), -1, -1, -1)
        mask = visible[at[..., None], :, rows[:, :, None], keys[:, None]].permute(0, 3, 1, 2)
        mask = mask & real[:, None, :, None] & known[:, None, None]
        query = seen.query.transpose(1, 2)[at, rows * stride].transpose(1, 2).float().contiguous()
        key, value = (x.transpose(1, 2)[at, keys].transpose(1, 2).float().contiguous() for x in (seen.key, seen.value))
        target = seen.output[at, rows * stride].transpose(1, 2).float()
        for block in _blocks(rows.shape[1], len(entries) * heads * keys.shape[1]):
            some = mask[:, :, block].any(0).any(0).any(0).nonzero()
            near = slice(int(some[0]), int(some[-1]) + 1)
            yield rows_of(
                path, query[:, :, block], key[:, :, near], value[:, :, near], target[:, :, block],
                mask[:, :, block, near], real[:, block], seen.scaling, first + entries, torch.float64,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Used:
    """Which rows and keys of a batch count.

    Attributes:
        rows: bool (B, rows), those that are real and see a key.
        keys: bool (B, Tk), those that such a row sees.
        visible: bool (B or 1, 1 or H, rows, Tk).
    """

    rows: Tensor
    keys: Tensor
    visible: Tensor

    @classmethod
    def of(cls, seen: Observation, stride: int) -> _Used:
        """Returns what counts of every `stride`-th row."""
        batch, _, q_len, _ = seen.query.shape
        visible = seen.visible(range(0, q_len, stride))
        every = visible.expand(batch, -1, -1, -1)
        real = every.new_ones(batch, every.shape[2]) if seen.real is None else seen.real[:, ::stride]
        found = []
        step = max(1, _PATTERN // max(1, every[0].numel()))
        for part in (slice(start, start + step) for start in range(0, batch, step)):
            some = every[part].any(1) & real[part, :, None]
            found.append((some.any(-1), some.any(1)))
        rows, keys = (torch.cat(parts) for parts in zip(*found, strict=True))
        return cls(rows, keys, visible)

    def groups(self, heads: int) -> Iterator[Tensor]:
        """Yields the numbers of entries that lie together, about as long as each other; none without rows."""
        sizes = torch.stack([self.rows.sum(1), self.keys.sum(1)], -1).tolist()
        group: list[int] = []
        longest, widest, own = 0, 0, 0
        for entry in sorted(range(len(sizes)), key=lambda entry: sizes[entry], reverse=True):
            rows, keys = sizes[entry]
            if rows == 0:
                break
            longer, wider = max(longest, rows), max(widest, keys)
            together = (len(group) + 1) * longer * wider
            block = (len(group) + 1) * min(longer, _BLOCK_ROWS) * wider * heads
            if group and (block > _BLOCK_SCORES or own + rows * keys < _FILLED * together):
                yield self._numbers(group)
                group, longer, wider, own = [], rows, keys, 0
            group, longest, widest, own = [*group, entry], longer, wider, own + rows * keys
        if group:
            yield self._numbers(group)

    def _numbers(self, group: list[int]) -> Tensor:
        return torch.tensor(group, device=self.rows.device)


def _first_used(used: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the numbers of what is used, (n, most), in order and filled up, and which of them are used, bool."""
    counts = used.sum(1, keepdim=True)
    most = int(counts.max())
    numbers = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return numbers, torch.arange(most, device=used.device) < counts


def _blocks(rows: int, scores_of_a_row: int) -> list[slice]:
    """Returns the blocks of rows, about equally large."""
    most = min(_BLOCK_ROWS, max(1, _BLOCK_SCORES // scores_of_a_row))
    count = -(-rows // most)
    size = -(-rows // count)
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]
