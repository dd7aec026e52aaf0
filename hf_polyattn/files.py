"""Files that are whole or absent."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import SaveError

_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# How torch.save, safetensors and shutil.copytree, whose errors have no errno, say that they could not write.
_WORDS = (
    *(f"[Errno {number}]" for number in _FULL),
    "inline_container",
    "PytorchStreamWriter",
    "iostream",
    "Error while serializing",
)


@contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives another path to write a file or folder to, `partial_path`, and renames it at the end.

    An error inside leaves what was there before, and nothing else.

    Raises:
        SaveError: the disk is full.
    """
    path, partial = Path(path), partial_path(path)
    shutil.rmtree(partial.parent, ignore_errors=True)
    partial.parent.mkdir(parents=True)
    try:
        yield partial
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    except Exception as error:
        if isinstance(error, SaveError) or not _is_full(error):
            raise
        raise SaveError(
            f"{path} cannot be written: {error}. What was there before is kept; make room and try again."
        ) from error
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)


def _is_full(error: Exception) -> bool:
    return getattr(error, "errno", None) in _FULL or any(word in str(error) for word in _WORDS)


def partial_path(path: str | os.PathLike[str]) -> Path:
    """Returns where `written_beside` has a file or folder written: under its own name, in a folder beside it."""
    path = Path(path)
    return path.parent / f".partial-{path.name}" / path.name
