"""Shows the examples in docstrings, `>>> …` and what they print, as code: an extension of griffe."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


class DoctestBlocks(griffe.Extension):
    """Fences doctests, whose prompts Markdown would take for quotations."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrites the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(fenced, obj.docstring.value)


def fenced(example: re.Match[str]) -> str:
    """Returns an example as a block of a Python console."""
    indent = example["indent"]
    return f"{indent}```pycon\n{example[0]}\n{indent}```"
