"""What is given as batches: several of them, each the inputs of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import InputError


def require_several(batches: Any) -> None:
    """Raises InputError if what should be several batches is one, whose keys or rows would be taken for batches."""
    if isinstance(batches, (Mapping, Tensor, str)):
        raise InputError(
            f"a single batch was given, a {type(batches).__name__}, where several are expected: wrap it: [batch]"
        )


def require_inputs(batch: Any) -> None:
    """Raises InputError if a batch is no mapping of model inputs, which a training takes."""
    if not isinstance(batch, Mapping):
        raise InputError(
            f"a batch must be a mapping of model inputs, such as a tokenizer gives; got {type(batch).__name__}"
        )
