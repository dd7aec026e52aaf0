"""The rows of every layer in pass after pass: made once of what softmax showed, and kept while they fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from ..capture import Observation
from .packing import packed_rows
from .rows import Rows

LIMIT = 2**28  # bytes of rows that are kept; beyond it they are made again in each pass


class RowStore:
    """Makes rows of observations, which come in the same order in each pass, and keeps them for the next one.

    Args:
        limit: bytes that may be kept.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = LIMIT if limit is None else limit
        self.size = 0
        self._kept: dict[tuple[str, int], dict[int, list[Rows]]] = {}
        self.restart()

    def restart(self) -> None:
        """Begins a pass."""
        self._seen: dict[str, tuple[int, int]] = {}

    def rows(self, path: str, observation: Observation, stride: int) -> Iterator[Rows]:
        """Yields the rows of the next observation of a layer in this pass, see `packed_rows`.

        Raises:
            CalibrationError: scores or outputs that are not finite.
        """
        number, entries = self._seen.get(path, (0, 0))
        self._seen[path] = number + 1, entries + len(observation.query)
        kept = self._kept.setdefault((path, stride), {})
        if number in kept:
            yield from kept[number]
            return
        made: list[Rows] | None = []
        for rows in packed_rows(path, observation, stride, entries):
            if made is not None:
                made.append(rows)
                if not self._fits(path, stride, rows.bytes):
                    self.size -= sum(rows.bytes for rows in made[:-1])
                    made = None
            yield rows
        if made is not None:
            kept[number] = made

    def _fits(self, path: str, stride: int, size: int) -> bool:
        """Counts some bytes, if they can be kept; rows of the layer that are taken with another stride make room."""
        if self.size + size > self.limit:
            for key in [key for key in self._kept if key[0] == path and key[1] != stride]:
                self.size -= sum(rows.bytes for rows in chain.from_iterable(self._kept.pop(key).values()))
        if self.size + size > self.limit:
            return False
        self.size += size
        return True
