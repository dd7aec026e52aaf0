"""The places of the Llama that the tests of the monitor watch."""

from __future__ import annotations

from typing import Any


def path(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


def attention(model: Any, layer: int) -> Any:
    return model.model.layers[layer].self_attn
