"""What an attention module of Transformers is: does it dispatch through the interface, how many heads has it.

Read from the attention class itself, so that a new family needs nothing here unless its heads are named
differently.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
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
_WIDTH = ("hidden_size", "d_model", "embed_dim", "n_embd", "dim_out", "dim")
# ALL_ATTENTION_FUNCTIONS without `get_interface`: Kosmos-2.5 vision and the Qwen2.5-Omni vocoder look functions up
# in ways that miss registered ones.
_SOFTMAX_CALL = re.compile(
    "softmax|scaled_dot_product|multi_head_attention|logsumexp|flash_attention|ALL_ATTENTION_FUNCTIONS", re.IGNORECASE
)
_SPARSE_KEYWORDS = {"indices", "block_indices"}
# Families that read what only softmax attention has.
_OBSTACLES = {"NllbMoeAttention": "its router reads the additive mask of eager attention"}

_ATTENTION_CLASS = re.compile(r"attention|attn", re.IGNORECASE)
_CROSS_ATTENTION = re.compile(
    r"cross|encoder_?attn|encoder_?attention|enc_?dec_?attention|token_to_image|image_to_token", re.IGNORECASE
)


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
        """Name of the module's class."""
        return type(self.module).__name__


def attention_sites(model: nn.Module) -> list[AttentionSite]:
    """Returns every module of `model` that computes softmax attention, through the interface or hard-coded."""
    sites: list[AttentionSite] = []
    for path, module in model.named_modules():
        kind = type(module)
        if not dispatches(kind) and not hard_coded_softmax(kind):
            continue
        heads, head_dim = head_shape(module)
        layer = _layer(path, module, len(sites))
        obstacle = _obstacle(module, heads, head_dim)
        sites.append(AttentionSite(path, module, layer, heads, head_dim, _is_cross(path, module), obstacle))
    return sites


def _obstacle(module: nn.Module, heads: int, head_dim: int) -> str | None:
    """Returns why an attention module cannot be made polynomial, or None."""
    if not dispatches(type(module)):
        return "hard-coded softmax, it does not use the attention interface"
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation is None:
        return "it has no config whose attention implementation could be chosen"
    if not heads or not head_dim:
        return "its number of heads or head dim cannot be read"
    if not _SPARSE_KEYWORDS.isdisjoint(_mentions(type(module)).keywords):
        return "sparse attention that hides keys by other means than the mask"
    if hasattr(module, "has_relative_attention_bias") and "position_bias" in _mentions(type(module)).keywords:  # T5
        return "it passes 'position_bias', a bias on its scores that polynomial attention does not have"
    if implementation == "eager" and not hasattr(module, "is_causal"):
        return "it has no is_causal, so a missing mask could mean either"
    return _OBSTACLES.get(type(module).__name__)


def dispatches(kind: type[nn.Module]) -> bool:
    """Whether a module class calls `ALL_ATTENTION_FUNCTIONS.get_interface`."""
    return "get_interface" in _mentions(kind).names


def hard_coded_softmax(kind: type[nn.Module]) -> bool:
    """Whether a module class is an attention that computes softmax by itself."""
    if dispatches(kind) or not _ATTENTION_CLASS.search(kind.__name__):
        return False
    return any(_SOFTMAX_CALL.search(name) for name in _mentions(kind).names)


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
    # Only what follows the layer number: `cross_modal_layers.0.attention` is self-attention in a layer that has both.
    return _CROSS_ATTENTION.search(re.split(r"\.\d+\.", path)[-1]) is not None


@dataclass(frozen=True, slots=True)
class _Mentions:
    """Names of globals and attributes, and of keyword arguments, that the methods of a class mention."""

    names: frozenset[str]
    keywords: frozenset[str]


_READ: dict[type[nn.Module], _Mentions] = {}


def _mentions(kind: type[nn.Module]) -> _Mentions:
    """Returns what the methods of a class mention, `nn.Module`'s own left out.

    An overridden method counts only where an override calls `super()`.
    """
    if kind not in _READ:
        used: list[CodeType] = []
        overridden: list[CodeType] = []
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            for name, attribute in vars(base).items():
                if name != "__init__" and inspect.isfunction(attribute):
                    codes = used if getattr(kind, name, None) is attribute else overridden
                    codes.extend(_code_objects(inspect.unwrap(attribute).__code__))
        if any("super" in code.co_names for code in used):
            used += overridden
        _READ[kind] = _Mentions(
            frozenset(name for code in used for name in code.co_names),
            frozenset(name for code in used for constant in code.co_consts for name in _strings(constant)),
        )
    return _READ[kind]


def _strings(constant: object) -> tuple[str, ...]:
    """Returns the keyword names in a constant of compiled code: it holds them as strings or in tuples."""
    names = constant if isinstance(constant, tuple) else (constant,)
    return tuple(name for name in names if isinstance(name, str))


def _code_objects(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_objects(constant)
