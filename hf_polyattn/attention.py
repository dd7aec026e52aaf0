"""The attention function and the mask function that Transformers finds under the name "polyattn"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .core import CHILD_NAME
from .errors import InputError, UnsupportedArgumentError

IMPLEMENTATION = "polyattn"

# Arguments that change what softmax attention computes and that w = p(t) cannot carry.
_UNSUPPORTED = ("softcap", "position_bias", "s_aux", "sinks", "cache", "attn_bias")

# Additive masks hold 0 where a score is visible and a large negative number where it is not: -1e4, which
# bfloat16 rounds to -9984, or less.
_MASKED_BELOW = -9984.0


def register(attention_interface: Any) -> None:
    """Registers "polyattn" with Transformers: the attention function, and `sdpa_mask` for its masks.

    Args:
        attention_interface: `transformers.modeling_utils.AttentionInterface`, which imports this package's hooks.
    """
    attention_interface.register(IMPLEMENTATION, polyattn_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def polyattn_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Returns the attention output and, if asked for, the attention weights, as Transformers expects them.

    Args:
        module: the attention module; without a `polyattn` child it computes softmax attention.
        query: (B, H, Tq, D).
        key: (B, G, Tk, D), not expanded.
        value: (B, G, Tk, Dv).
        attention_mask: None, bool (True = visible) or additive, broadcastable to (B, H, Tq, Tk).
        scaling: of the scores; D^(-1/2) if None.
        dropout: probability of dropping an attention weight.
        is_causal: overrides `module.is_causal`; only effective without a mask and for Tq > 1.
        sliding_window: effective where is_causal is; a mask carries its own window.
        **kwargs: what else a model passes; unsupported arguments must be None.

    Returns:
        Output (B, Tq, H, Dv) contiguous, and the weights (B, H, Tq, Tk) if `output_attentions` asks for them.

    Raises:
        UnsupportedArgumentError: an argument that polynomial attention cannot honour.
        InputError: an additive mask with a position bias in it.
    """
    polynomial = module._modules.get(CHILD_NAME)
    if polynomial is None:
        return softmax_forward(module, query, key, value, attention_mask, scaling, dropout, is_causal, **kwargs)

    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedArgumentError(
                f"{type(module).__name__} passes {name!r}, which polynomial attention does not support. "
                "Leave this module softmax: patch_model(..., exclude=...)."
            )
    if query.shape[0] == 1 and key.shape[0] > 1:  # learned queries that SDPA broadcasts over the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(query.shape[2] > 1 and attention_mask is None and is_causal)
    arguments: dict[str, Any] = {
        "mask": None if attention_mask is None else visible_scores(attention_mask),
        "causal": causal,
        "window": sliding_window if causal else None,
        "scaling": scaling,
    }

    observer = getattr(polynomial, "observer", None)
    if observer is not None:
        output, weights = softmax_forward(
            module, query, key, value, attention_mask, scaling, dropout, is_causal, **kwargs
        )
        observer(query, key, value, output, **arguments)
        return output, weights
    if weights_requested(kwargs):
        output, weights = polynomial(query, key, value, dropout=dropout, return_weights=True, **arguments)
        return output, weights.to(query.dtype)
    return polynomial(query, key, value, dropout=dropout, **arguments), None


def softmax_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    is_causal: bool | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Returns softmax attention for a module that stays softmax in a patched model; weights if asked for."""
    if not weights_requested(kwargs):
        kwargs.pop("output_attentions", None)
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    q_len, k_len = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is None and is_causal and q_len > 1:
        attention_mask = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=dropout > 0.0)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def visible_scores(mask: Tensor) -> Tensor:
    """Returns the bool mask (True = visible) of a bool or additive 4D mask.

    Raises:
        InputError: integer masks, and additive masks with values that are neither 0 nor a large negative number.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise InputError(f"a 4D attention mask must be bool or additive float, got {mask.dtype}. Use mask.bool().")
    visible = mask == 0.0
    if not torch.compiler.is_compiling() and not bool((visible | (mask <= _MASKED_BELOW)).all()):
        raise InputError(
            "the additive attention mask has values between 0 and -1e4: a position bias, which polynomial "
            "attention cannot add to its scores. Allowed: 0 (visible) and values of -1e4 or less (masked)."
        )
    return visible


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
