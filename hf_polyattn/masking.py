"""The mask function that Transformers finds under the name "polyattn", and the masks that reach the attention.

Transformers describes a mask by nested functions of (batch, head, query, key). Padding, causality, sliding windows
and packed sequences let every query see one range of keys: those are handed on as an int32 tensor (B, 1, Tq or 1, 2)
of starts and stops in place of a bool (B, 1, Tq, Tk). Whatever else there is becomes the dense mask of SDPA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import masking_utils
from transformers.utils import is_tracing

from .errors import InputError
from .ops.masks import within

# Additive masks hold 0 where a score is visible and a large negative number where it is not: -1e4, which
# bfloat16 rounds to -9984, or less.
_MASKED_BELOW = -9984.0


def polyattn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Returns what each query sees, as ranges of keys where it can; arguments as of `sdpa_mask` of Transformers.

    Returns:
        None where the module's own causality says all; int32 (B or 1, 1, Tq or 1, 2), the start and stop of the
        visible keys; or bool (B, 1, Tq, Tk), True = visible: under tracing, for patterns that are no ranges, and for
        padding with holes.
    """
    ranges = None
    if not (use_vmap or is_tracing(attention_mask) or torch.compiler.is_compiling()) and kv_length > 2:
        ranges = _ranges(
            q_length, kv_length, int(q_offset) - kv_offset, kv_offset, mask_function, attention_mask, device
        )
    if ranges is None:
        dense: Tensor | None = masking_utils.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
        return dense
    causal = torch.stack([torch.zeros(q_length), torch.arange(1, q_length + 1)], dim=-1).to(ranges)
    if allow_is_causal_skip and torch.equal(ranges.expand(-1, q_length, -1), causal.expand(len(ranges), -1, -1)):
        return None
    everything = torch.tensor([0, kv_length]).to(ranges)
    skip = allow_is_bidirectional_skip or (allow_is_causal_skip and q_length == 1)
    if skip and torch.equal(ranges, everything.expand_as(ranges)):
        return None
    return ranges[:, None]


def _ranges(
    q_length: int,
    kv_length: int,
    offset: int,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    device: torch.device | str,
) -> Tensor | None:
    """Returns the ranges (B or 1, Tq or 1, 2) of keys of a mask function and 2D padding; None if they are none.

    Args:
        offset: the number of the first query, counted in keys.
        kv_offset: the column of `attention_mask` that belongs to the first key.
    """
    pattern = _pattern(mask_function)
    if pattern is None:
        return None
    behind, ahead, sequences = pattern
    bounds = [torch.tensor([[[0, kv_length]]], device=device)]
    if behind < math.inf or ahead < math.inf:
        query = torch.arange(q_length, device=device)[None, :, None] + offset
        start = query - (kv_length + q_length + abs(offset) if behind == math.inf else int(behind))
        stop = query + (kv_length + q_length + abs(offset) if ahead == math.inf else int(ahead)) + 1
        bounds.append(torch.cat([start, stop], dim=-1))
    if sequences is not None:
        if sequences.shape[1] != kv_length or q_length != kv_length or bool((sequences.diff(dim=1) < 0).any()):
            return None
        sequences = sequences.contiguous()
        edges = [torch.searchsorted(sequences, sequences, right=right) for right in (False, True)]
        bounds.append(torch.stack(edges, dim=-1))
    if attention_mask is not None:
        padding = F.pad(attention_mask.bool(), (0, max(0, kv_offset + kv_length - attention_mask.shape[1])))
        padding = padding[:, kv_offset : kv_offset + kv_length]
        first, count = padding.int().argmax(1), padding.sum(1)
        last = kv_length - padding.flip(1).int().argmax(1)
        last = torch.where(count > 0, last, first)
        if not torch.equal(last - first, count):
            return None
        bounds.append(torch.stack([first, last], dim=-1)[:, None])
    start, stop = bounds[0].unbind(-1)
    for bound in bounds[1:]:
        start, stop = torch.maximum(start, bound[..., 0]), torch.minimum(stop, bound[..., 1])
    return torch.stack([start, torch.maximum(start, stop)], dim=-1).to(torch.int32)


def _pattern(function: Callable[..., Any]) -> tuple[float, float, Tensor | None] | None:
    """Returns how many keys behind and ahead of itself a query sees, and numbers of packed sequences (B, T).

    None for a function that is not one of Transformers' own, or not of this kind.
    """
    if function is masking_utils.causal_mask_function:
        return math.inf, 0, None
    if function is masking_utils.bidirectional_mask_function:
        return math.inf, math.inf, None
    if getattr(function, "__module__", None) != masking_utils.__name__ or function.__closure__ is None:
        return None
    values = [cell.cell_contents for cell in function.__closure__]
    closure = dict(zip(function.__code__.co_freevars, values, strict=True))
    maker = function.__qualname__.partition(".")[0]
    if maker == "sliding_window_overlay":
        return closure["sliding_window"] - 1, math.inf, None
    if maker == "sliding_window_bidirectional_overlay":
        return closure["sliding_window"], closure["sliding_window"], None
    if maker == "packed_sequence_mask_function":
        return math.inf, math.inf, closure["packed_sequence_mask"]
    if maker == "remap_positions_for_packed_sequence":  # within a sequence, distances are as before
        return _pattern(closure["mask_function"])
    if maker == "and_masks":
        parts = [_pattern(part) for part in closure["mask_functions"]]
        if any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        packed = [sequences for *_, sequences in known if sequences is not None]
        if len(packed) > 1 and not all(torch.equal(packed[0], other) for other in packed[1:]):
            return None
        return min(p[0] for p in known), min(p[1] for p in known), packed[0] if packed else None
    return None


def split_mask(mask: Tensor | None, k_len: int) -> tuple[Tensor | None, Tensor | None]:
    """Returns the mask of a model as the operator takes it: a bool mask or ranges (B or 1, Tq or 1, 2), or neither.

    Raises:
        InputError: of `visible_scores`.
    """
    if mask is None:
        return None, None
    if mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[3] == 2 and k_len > 2:
        return None, mask[:, 0]
    return visible_scores(mask), None


def dense_mask(mask: Tensor | None, q_len: int, k_len: int) -> Tensor | None:
    """Returns the mask of a model with its ranges, if it is that, as a bool mask (B or 1, 1, Tq, Tk)."""
    _, ranges = split_mask(mask, k_len) if mask is not None and mask.dtype == torch.int32 else (None, None)
    if ranges is None:
        return mask
    return within(ranges, slice(0, k_len)).expand(-1, -1, q_len, -1)


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
