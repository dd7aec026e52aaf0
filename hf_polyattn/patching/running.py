"""What the attention modules of a patched model run: their polynomials, or something else in spite of them.

A module runs what its config says at the moment. The config's own attribute and `set_attn_implementation` refuse to be
changed; a config that was put in its place, or written to behind the attribute, is noticed here, where it would make
results of polynomials out of softmax.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import PatchError
from .patched import patched_modules, pretrained_model, require_patched
from .saved_config import IMPLEMENTATION, IMPLEMENTATIONS
from .threads import is_doing

SOFTMAX_BLOCK = "softmax_attention"


def implementation_of(module: nn.Module) -> str | None:
    """Returns the attention that an attention module runs now."""
    config: Any = module.config
    implementation: str | None = config._attn_implementation
    return implementation


def require_polynomial(model: nn.Module, *, in_softmax_block: bool = False) -> PreTrainedModel:
    """Returns the model inside, of which every patched module runs its polynomial.

    Args:
        model: a `PreTrainedModel` or a wrapper around one.
        in_softmax_block: whether softmax is right inside of this thread's `softmax_attention(model)`.

    Raises:
        PatchError: the model is not patched, or a patched module runs another attention.
    """
    root = pretrained_model(model)
    require_patched(root)
    modules = patched_modules(root)
    others = [(path, implementation_of(module)) for path, module in modules]
    others = [(path, found) for path, found in others if found not in IMPLEMENTATIONS]
    in_block = is_doing(root, SOFTMAX_BLOCK)
    if not others or (in_block and in_softmax_block):
        return root
    path, found = others[0]
    what = (
        f"{type(root).__name__} has polynomials, but {len(others)} of {len(modules)} modules run {found!r}, at {path!r}"
    )
    if in_block:
        raise PatchError(f"{what}: this is inside of softmax_attention(model). Do it after that block.")
    raise PatchError(
        f"{what}: somebody changed their config. Call model.set_attn_implementation({IMPLEMENTATION!r}) to have the "
        "polynomials back, or unpatch_model(model) for softmax."
    )
