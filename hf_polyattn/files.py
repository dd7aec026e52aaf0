"""Files that are whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives another path to write a file or folder to, `partial_path`, and renames it at the end.

    An error inside leaves what was there before, and nothing else.
    """
    path, partial = Path(path), partial_path(path)
    shutil.rmtree(partial.parent, ignore_errors=True)
    partial.parent.mkdir(parents=True)
    try:
        yield partial
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)


def partial_path(path: str | os.PathLike[str]) -> Path:
    """Returns where `written_beside` has a file or folder written: under its own name, in a folder beside it."""
    path = Path(path)
    return path.parent / f".partial-{path.name}" / path.name
