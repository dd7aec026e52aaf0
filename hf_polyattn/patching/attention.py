"""The attention function that Transformers finds under the name "polyattn"."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from ..errors import UnsupportedArgumentError
from .core import CHILD_NAME
from .masking import packed_mask, polyattn_mask, split_mask
from .range_mask import dense_mask
from .saved_config import IMPLEMENTATIONS

# Arguments that change what softmax attention computes and that w = p(t) cannot carry.
_UNSUPPORTED = ("softcap", "position_bias", "s_aux", "sinks", "cache", "attn_bias")


def register(attention_interface: Any) -> None:
    """Registers "polyattn" with Transformers, and the name in saved configs: attention function and mask function.

    Args:
        attention_interface: `transformers.modeling_utils.AttentionInterface`, which imports this package's hooks.
    """
    for name in IMPLEMENTATIONS:
        attention_interface.register(name, polyattn_forward)
        AttentionMaskInterface.register(name, polyattn_mask)


def polyattn_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Returns the attention output and, if asked for, the attention weights, as Transformers expects them.

    Args:
        module: the attention module; without a `polyattn` child it computes softmax attention.
        query: (B, H, Tq, D).
        key: (B, G, Tk, D), not expanded.
        value: (B, G, Tk, Dv).
        attention_mask: None; bool (True = visible) or additive, broadcastable to (B, H, Tq, Tk); or a `RangeMask`.
        **kwargs: what the model passes. Honoured are `scaling` of the scores (D^(-1/2) if None), `dropout` of
            the attention weights, `is_causal` (overrides `module.is_causal`; effective without a mask and for
            Tq > 1), `sliding_window` (where is_causal is; a mask carries its own), `output_attentions`, and
            `cu_seq_lens_q` with `cu_seq_lens_k`, the borders of packed sequences.

    Returns:
        Output (B, Tq, H, Dv) contiguous, and the weights (B, H, Tq, Tk) if they are asked for.

    Raises:
        UnsupportedArgumentError: an argument that polynomial attention cannot honour.
        InputError: an additive mask with a position bias in it.
    """
    borders = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("cu_seq_lens_k", None)
    causal = _causal(module, query, attention_mask, kwargs)
    window = kwargs.get("sliding_window") if causal else None
    if any(border is not None for border in borders):
        attention_mask = packed_mask(attention_mask, borders, query, key, causal, window)
        causal, window = False, None
    polynomial: Any = module._modules.get(CHILD_NAME)
    if polynomial is None:
        return softmax_forward(module, query, key, value, attention_mask, **kwargs)

    unsupported = _unsupported(kwargs)
    if unsupported:
        raise UnsupportedArgumentError(
            f"{type(module).__name__} passes {unsupported[0]!r}, which polynomial attention does not support. "
            "Leave this module softmax: patch_model(..., exclude=...)."
        )
    if query.shape[0] == 1 and key.shape[0] > 1:  # learned queries that SDPA broadcasts over the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    observer = polynomial.observer
    if observer is not None:
        attention_mask = dense_mask(attention_mask)
    mask, ranges = split_mask(attention_mask)
    arguments: dict[str, Any] = {
        "mask": mask,
        "causal": causal,
        "window": window,
        "scaling": kwargs.get("scaling"),
    }
    if observer is not None:
        output, weights = softmax_forward(module, query, key, value, attention_mask, **kwargs)
        observer(query, key, value, output, **arguments)
        return output, weights
    arguments["ranges"] = ranges
    arguments["dropout"] = kwargs.get("dropout", 0.0)
    if weights_requested(kwargs):
        output, weights = polynomial(query, key, value, return_weights=True, **arguments)
        return output, weights.to(query.dtype)
    return polynomial(query, key, value, **arguments), None


def softmax_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Returns the softmax attention of a module as its model defines it; weights if asked for.

    By SDPA, but for weights and for arguments that SDPA may drop without a word (soft caps, sinks): those take
    the `eager_attention_forward` of the module's own family.

    Raises:
        UnsupportedArgumentError: there is no such function, and an argument that SDPA may drop.
    """
    attention_mask = dense_mask(attention_mask)
    unsupported = _unsupported(kwargs)
    eager = _eager_attention(type(module)) if unsupported or weights_requested(kwargs) else None
    if eager is None and unsupported:
        raise UnsupportedArgumentError(
            f"{type(module).__name__} passes {unsupported[0]!r} and its model defines no eager_attention_forward that "
            "would honour it. Use softmax_attention(model) or unpatch_model(model)."
        )
    if eager is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    if _causal(module, query, attention_mask, kwargs):
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, hidden)
    return eager(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


def _eager_attention(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """Returns the softmax function that an attention class falls back to under "eager"; None if there is none."""
    forward: Any = inspect.unwrap(kind.forward)
    names = [name for name in forward.__code__.co_names if name.endswith("eager_attention_forward")]
    return forward.__globals__.get(names[0]) if names else None


def _unsupported(kwargs: dict[str, Any]) -> list[str]:
    return [name for name in _UNSUPPORTED if kwargs.get(name) is not None]


def _causal(module: nn.Module, query: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return bool(attention_mask is None and query.shape[2] > 1 and is_causal)


def weights_requested(kwargs: dict[str, Any]) -> bool:
    """Whether the caller of the model asked for attention weights.

    Most models hand `output_attentions` on to the attention function; GPT-2 drops it, and only the recorder
    of Transformers, which collects the weights by hooks, knows.
    """
    if kwargs.get("output_attentions"):
        return True
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return False
    collected = _active_collector.get()
    return bool(collected) and any("attentions" in name for name in collected)
