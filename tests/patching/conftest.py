"""Fixtures of the tests of patching."""

from __future__ import annotations

from typing import Any

import pytest
from in_double import BASE


@pytest.fixture
def double(pretrained: Any, polynomial: Any) -> Any:
    """`double(name, config=None, layers=None, **kwargs)`: a checkpoint with polynomials, in float64."""

    def make(name: str, config: Any = None, layers: int | None = None, **kwargs: Any) -> Any:
        if layers is not None:
            kwargs["n_layer" if name.startswith("gpt2") else "num_hidden_layers"] = layers
        return polynomial(pretrained(name, BASE[name], **kwargs), config).double()

    return make
