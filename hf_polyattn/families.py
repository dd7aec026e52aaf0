"""What an attention module of Transformers is: does it dispatch through the interface, how many heads has it.

Read from the attention class itself, so that a new family needs nothing here unless its heads are named
differently.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "encoder_attention_heads")
_HEAD_DIM = (
    "qk_head_dim",
    "head_dim",
    "attention_head_size",
    "head_size",
    "key_value_proj_dim",
    "dim_head",
    "dim_per_head",
    "d_kv",
)
_WIDTH = ("hidden_size", "d_model", "embed_dim", "n_embd", "dim")
_SOFTMAX_CALLS = {
    "softmax",
    "Softmax",
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "logsumexp",
    "_flash_attention_forward",
}
_ATTENTION_CLASS = re.compile(r"attention|attn", re.IGNORECASE)
_CROSS_ATTENTION = re.compile(r"cross|encoder_?attn|encoder_?attention|enc_?dec_?attention", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention module of a model.

    Attributes:
        path: of the module in the model.
        module: the attention module.
        layer: its layer number: `layer_idx`, else the first number in the path, else its place among the sites.
        heads: H, query heads; 0 if unknown.
        head_dim: D, of queries and keys; 0 if unknown.
        cross_attention: whether its keys come from elsewhere.
        obstacle: why it cannot be patched; None if it can.
    """

    path: str
    module: nn.Module
    layer: int
    heads: int
    head_dim: int
    cross_attention: bool
    obstacle: str | None

    @property
    def class_name(self) -> str:
        return type(self.module).__name__


def attention_sites(model: nn.Module) -> list[AttentionSite]:
    """Returns every module of `model` that computes softmax attention, through the interface or hard-coded."""
    sites: list[AttentionSite] = []
    for path, module in model.named_modules():
        kind = type(module)
        if dispatches(kind):
            heads, head_dim = head_shape(module)
            obstacle = None if heads and head_dim else "its number of heads or head dim cannot be read"
            if getattr(getattr(module, "config", None), "_attn_implementation", None) is None:
                obstacle = "it has no config whose attention implementation could be chosen"
        elif hard_coded_softmax(kind):
            heads, head_dim = head_shape(module)
            obstacle = "hard-coded softmax, it does not use the attention interface"
        else:
            continue
        layer = _layer(path, module, len(sites))
        sites.append(AttentionSite(path, module, layer, heads, head_dim, _is_cross(path, module), obstacle))
    return sites


@cache
def dispatches(kind: type[nn.Module]) -> bool:
    """Whether a module class calls `ALL_ATTENTION_FUNCTIONS.get_interface`."""
    return "get_interface" in _names_used(kind)


@cache
def hard_coded_softmax(kind: type[nn.Module]) -> bool:
    """Whether a module class is an attention that computes softmax by itself."""
    if dispatches(kind) or not _ATTENTION_CLASS.search(kind.__name__):
        return False
    return not _SOFTMAX_CALLS.isdisjoint(_names_used(kind))


def head_shape(module: nn.Module) -> tuple[int, int]:
    """Returns (query heads, head dim of queries and keys) of an attention module; 0 for what cannot be read."""
    config = getattr(module, "config", None)
    heads = _first_int(module, _HEADS) or _first_int(config, _HEADS)
    head_dim = _first_int(module, _HEAD_DIM)
    projected = getattr(getattr(module, "q_proj", None), "out_features", None)
    if not head_dim and heads and isinstance(projected, int):
        head_dim = projected // heads
    head_dim = head_dim or _first_int(config, _HEAD_DIM)
    width = _first_int(module, _WIDTH) or _first_int(config, _WIDTH)
    if not head_dim and heads and width:
        head_dim = width // heads
    return heads, head_dim


def _first_int(owner: Any, names: tuple[str, ...]) -> int:
    for name in names:
        number = getattr(owner, name, None)
        if isinstance(number, int) and not isinstance(number, bool) and number > 0:
            return number
    return 0


def _layer(path: str, module: nn.Module, place: int) -> int:
    index = getattr(module, "layer_idx", None)
    if isinstance(index, int):
        return index
    numbers = [part for part in path.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else place


def _is_cross(path: str, module: nn.Module) -> bool:
    if getattr(module, "is_cross_attention", False) is True or "Cross" in type(module).__name__:
        return True
    return any(_CROSS_ATTENTION.search(part) for part in path.split("."))


def _names_used(kind: type[nn.Module]) -> frozenset[str]:
    """Returns the global and attribute names that the methods of a class mention, `nn.Module`'s own left out.

    An overridden method counts only where an override calls `super()`.
    """
    used: set[str] = set()
    overridden: set[str] = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            break
        for name, attribute in vars(base).items():
            if name == "__init__" or not inspect.isfunction(attribute):
                continue
            names = used if getattr(kind, name, None) is attribute else overridden
            for code in _code_objects(inspect.unwrap(attribute).__code__):
                names.update(code.co_names)
    return frozenset(used | overridden if "super" in used else used)


def _code_objects(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_objects(constant)
