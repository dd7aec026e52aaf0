"""Progress bars, for people only: in a log or a pipe each of their steps would be a line."""

from __future__ import annotations


def hidden(progress: bool) -> bool | None:
    """Returns the `disable` of a tqdm bar: None, where one is asked for, shows it on a terminal and in a notebook."""
    return None if progress else True
