"""The mask function that Transformers finds under the name "polyattn", and the masks that reach the attention.

Transformers describes a mask by nested functions of (batch, head, query, key). Padding, causality, sliding windows
and packed sequences let every query see one range of keys: those become a `RangeMask`, which is a bool mask to whoever
asks and holds two numbers a query. Whatever else there is becomes the dense mask of SDPA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import masking_utils

from ..errors import InputError, UnsupportedArgumentError
from ..ops.masks import packed_ranges, within
from .range_mask import RangeMask, dense_mask
from .recording import is_recorded

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
        None where the module's own causality says all; a `RangeMask` (B or 1, 1, Tq, Tk); or a plain bool mask of that
        shape, True = visible: where it is recorded, for patterns that are no ranges, and for padding with holes.
    """
    ranges = None
    if not (use_vmap or is_recorded(attention_mask) or is_recorded(torch.empty(0, device=device))):
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
    return RangeMask(ranges.expand(batch_size, -1, -1), q_length, kv_length)


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


def packed_mask(
    mask: Tensor | None,
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    query: Tensor,
    key: Tensor,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Returns a mask that also keeps packed sequences apart, whose borders the caller of a model passes.

    `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes such batches. FlashAttention reads the borders;
    SDPA ignores them, and there one sequence sees the next unless Transformers reads them off the position ids.

    Args:
        mask: (B or 1, 1 or H, T, T) of the model, bool or additive; None where `causal` says all.
        cu_seqlens: `cu_seq_lens_q` and `cu_seq_lens_k`, int (sequences + 1), where each sequence starts, and the end.
        query: (1, H, T, D).
        key: (1, G, T, D).
        causal: whether query i sees keys up to i only.
        window: of those, only the last so many.

    Raises:
        UnsupportedArgumentError: borders of queries and keys that differ, more than one row, or a cache.
    """
    (of_queries, of_keys), (batch, _, q_len, _), k_len = cu_seqlens, query.shape, key.shape[2]
    if of_queries is None or of_keys is None or of_queries.shape != of_keys.shape or batch != 1 or q_len != k_len:
        raise UnsupportedArgumentError(
            "cu_seq_lens_q and cu_seq_lens_k are for self-attention over one row of packed sequences, without a cache: "
            f"got {batch} rows of {q_len} queries and {k_len} keys, and borders "
            f"{[None if borders is None else tuple(borders.shape) for borders in cu_seqlens]}."
        )
    of_model = mask.ranges if isinstance(mask, RangeMask) else None
    if is_recorded(query) or of_keys.is_inference() or (mask is not None and of_model is None):
        return _apart(mask, of_keys, k_len, causal, window, recorded=is_recorded(query))
    # Every layer of a forward pass asks with the same tensors: the answer stays with the borders.
    asked, kept = (of_keys._version, k_len, causal, window), getattr(of_keys, "_polyattn_kept", None)
    if kept is None or kept[0] != asked or kept[1] is not of_model:
        kept = (asked, of_model, _apart(mask, of_keys, k_len, causal, window))
        of_keys._polyattn_kept = kept  # type: ignore[attr-defined]
    return kept[2]


def _apart(
    mask: Tensor | None, borders: Tensor, length: int, causal: bool, window: int | None, *, recorded: bool = False
) -> Tensor:
    """Returns the mask of `packed_mask`."""
    start, stop = packed_ranges(borders, length).unbind(-1)
    after = torch.arange(1, length + 1).to(start)
    if causal:
        stop = torch.minimum(stop, after)
    if window is not None:
        start = torch.maximum(start, after - window)
    if isinstance(mask, RangeMask) and mask.ranges is not None:
        start, stop = torch.maximum(start, mask.ranges[..., 0]), torch.minimum(stop, mask.ranges[..., 1])
        mask = None
    ranges = torch.stack([start, torch.maximum(start, stop)], dim=-1)
    if mask is None and not recorded:
        return RangeMask(ranges, length, length)
    apart = within(ranges, slice(0, length))
    return apart if mask is None else visible_scores(mask) & apart


def split_mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns the mask of a model as the operator takes it: a bool mask or ranges (B or 1, Tq or 1, 2), or neither.

    Raises:
        InputError: of `visible_scores`.
    """
    if isinstance(mask, RangeMask) and mask.ranges is not None:
        return None, mask.ranges
    mask = dense_mask(mask)
    return None if mask is None else visible_scores(mask), None


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
    if not is_recorded(mask) and not bool((visible | (mask <= _MASKED_BELOW)).all()):
        raise InputError(
            "the additive attention mask has values between 0 and -1e4: a position bias, which polynomial "
            "attention cannot add to its scores. Allowed: 0 (visible) and values of -1e4 or less (masked)."
        )
    return visible


def real_positions(inputs: Mapping[str, Any], *, decoder: bool = False) -> Tensor | None:
    """Returns which positions of a batch are not padding, a 2D mask (B, T); None where that is not said.

    Args:
        inputs: of a model.
        decoder: the positions of the decoder of an encoder–decoder model. Without `decoder_attention_mask` they are
            those whose `labels` are not −100: the decoder's inputs are the labels, one place to the right. Without any
            decoder inputs they are the encoder's, of which models then make them.
    """
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if decoder and "decoder_attention_mask" in inputs:
        mask = inputs["decoder_attention_mask"]
    elif decoder and isinstance(labels, Tensor) and labels.dim() == 2:
        mask = labels != -100
    elif decoder and not {"decoder_input_ids", "decoder_inputs_embeds"}.isdisjoint(inputs):
        mask = None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
