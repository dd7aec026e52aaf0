"""Which keys a query row may see: a band and a range of keys a row cost O(T), a dense mask is the general case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import Call


def band(
    queries: range | slice, keys: range | slice, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """Returns the bool (queries, keys) pattern of `causal` and `window`; None where all is visible.

    Query i sees key j when j <= i (causal, aligned top-left) and |i - j| < window.
    """
    if not causal and window is None:
        return None
    i = torch.arange(queries.start, queries.stop, queries.step or 1, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, keys.step or 1, device=device)[None, :]
    visible = j <= i if causal else torch.ones_like(j <= i)
    if window is not None:
        visible = visible & ((i - j).abs() < window)
    return visible


def key_slice(queries: slice, k_len: int, causal: bool, window: int | None) -> slice:
    """Returns the smallest slice of keys outside which no row of `queries` sees anything."""
    start, stop = 0, k_len
    if causal:
        stop = min(stop, queries.stop)
    if window is not None:
        start = max(start, queries.start - window + 1)
        stop = min(stop, queries.stop - 1 + window)
    return slice(min(start, k_len), max(min(start, k_len), stop))


def within(ranges: Tensor, keys: slice) -> Tensor:
    """Returns the bool (B or 1, 1, Tq or 1, keys) pattern start <= j < stop of ranges (B or 1, Tq or 1, 2)."""
    j = torch.arange(keys.start, keys.stop, device=ranges.device)
    start, stop = ranges[:, None, :, None].unbind(-1)
    return (start <= j) & (j < stop)


def visible(
    queries: range | slice,
    keys: range | slice,
    device: torch.device,
    *,
    mask: Tensor | None,
    ranges: Tensor | None,
    causal: bool,
    window: int | None,
) -> Tensor | None:
    """Returns which keys query rows see, of the band, the ranges and the mask together; None where that is all.

    Args:
        queries, keys: the numbers of both.
        device: of the result.
        mask, ranges: of these queries and keys, else as of `polynomial_attention`, as are causal and window.

    Returns:
        bool, broadcastable to (B, H, queries, keys).
    """
    seen = band(queries, keys, causal, window, device)
    if ranges is not None:
        inside = within(ranges, slice(keys.start, keys.stop))
        seen = inside if seen is None else inside & seen
    if mask is not None:
        seen = mask if seen is None else mask & seen
    return seen


def visible_keys(
    rows: range,
    k_len: int,
    *,
    mask: Tensor | None,
    ranges: Tensor | None,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """Returns the bool (B or 1, H or 1, rows, Tk) pattern of the keys that query rows see.

    Args:
        rows: numbers of the query rows; may have a step.
        k_len: Tk.
        mask, ranges, causal, window: of `polynomial_attention`.
        device: of the result.
    """
    chosen = slice(rows.start, rows.stop, rows.step)
    ranges = ranges if ranges is None or ranges.shape[1] == 1 else ranges[:, chosen]
    mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, chosen]
    seen = visible(rows, range(k_len), device, mask=mask, ranges=ranges, causal=causal, window=window)
    every = torch.ones(1, 1, len(rows), k_len, dtype=torch.bool, device=device)
    return every if seen is None else every & seen


def pattern(call: Call, entries: slice, heads: slice, rows: slice, columns: slice) -> Tensor | None:
    """Returns what `visible` does of a part of a call's query rows and keys."""
    ranges, mask = call.ranges, call.mask
    return visible(
        rows,
        columns,
        call.query.device,
        mask=None if mask is None else _part(mask, entries, heads, rows, columns),
        ranges=None if ranges is None else _part(ranges, entries, rows, slice(None)),
        causal=call.causal,
        window=call.window,
    )


def _part(tensor: Tensor, *parts: slice) -> Tensor:
    """Slices a tensor, but not the dimensions that it broadcasts."""
    return tensor[tuple(p if size > 1 else slice(None) for p, size in zip(parts, tensor.shape, strict=True))]


def count_visible(
    queries: int,
    keys: int,
    device: torch.device,
    *,
    mask: Tensor | None = None,
    ranges: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Returns n_i, the keys that each query row sees, at least 1: int, broadcastable to (B, H, Tq).

    Arguments are those of `polynomial_attention`.
    """
    if mask is not None:
        parts: dict[str, Any] = {"mask": mask, "ranges": ranges, "causal": causal, "window": window}
        seen = visible(slice(0, queries), slice(0, keys), device, **parts)
        assert seen is not None
        return seen.sum(-1).clamp(min=1)
    i = torch.arange(queries, device=device)
    low, high = torch.zeros_like(i), torch.full_like(i, keys)
    if causal:
        high = high.minimum(i + 1)
    if window is not None:
        low, high = low.maximum(i - window + 1), high.minimum(i + window)
    if ranges is not None:
        start, stop = ranges[:, None].unbind(-1)
        low, high = low.maximum(start), high.minimum(stop)
    return (high - low).clamp(min=1).expand(*(1,) * (3 - high.dim()), *high.shape)


def longest_visible(queries: int, keys: int, device: torch.device, **pattern: Any) -> int:
    """Returns the most keys that any query row sees: how long a padded batch, or what is in a static cache, really is.

    With a mask, ranges or a window it looks at values, for which a GPU is waited: it is for calls that seem to be too
    long, and not for what is recorded. Arguments are those of `count_visible`.
    """
    if all(pattern.get(name) is None for name in ("mask", "ranges", "window")):
        return min(keys, queries) if pattern.get("causal") else keys
    count = count_visible(queries, keys, device, **pattern)
    return int(count.max()) if count.numel() > 0 else 0


def packed_ranges(cu_seqlens: Tensor, length: int) -> Tensor:
    """Returns the ranges (1, T, 2), int32, of sequences packed one after another: each row sees its own sequence.

    Args:
        cu_seqlens: int (sequences + 1), where each sequence starts, from 0 up to at most `length`; rows beyond
            the last one see nothing.
        length: T, static.
    """
    rows = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, rows, right=True)
    stops = torch.cat([cu_seqlens, cu_seqlens[-1:]])
    return torch.stack([stops[sequence - 1], stops[sequence]], dim=-1)[None].to(torch.int32)
