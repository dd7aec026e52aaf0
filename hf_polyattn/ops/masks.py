"""Which keys a query row may see."""

from __future__ import annotations

import torch
from torch import Tensor


def band(
    queries: range | slice, keys: range | slice, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """Returns the bool (queries, keys) pattern of `causal` and `window`; None where all is visible.

    Query i sees key j when j <= i (causal, aligned top-left) and |i - j| < window.
    """
    if not causal and window is None:
        return None
    i = torch.arange(queries.start, queries.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None, :]
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
