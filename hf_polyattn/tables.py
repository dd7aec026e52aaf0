"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def format_table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Returns rows as aligned text columns under a header."""
    cells = [header, *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
