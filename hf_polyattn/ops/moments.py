"""The mean and the variance of the scores that a query row sees: what its partition sum is predicted from.

    x_ij = scaling · q_i·k_j        m_i = (1/n_i) Σ_j x_ij        v_i = (1/n_i) Σ_j x_ij² − m_i²

Both are polynomials of queries and keys: m_i = scaling · q_i·K̄ and v_i = scaling² · q_iᵀ C q_i, with K̄ the mean and C
the covariance of the keys that are visible. Where all rows of a sequence see the same keys that costs O(T·D²); causal
rows take sums over whole chunks of keys and the scores of their own chunk. Other rows, and few, take the scores.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .api import polynomial_attention
from .call import compute_dtype, without_autocast
from .checks import check_masks
from .masks import count_visible, visible, within
from .modes import autocast_inputs

_CHUNK = 64  # causal rows that take the scores of their own chunk
_SCORES = 2**24  # scores that are held at once, at most


def score_moments(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    ranges: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scaling: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns the mean and the variance of the visible scaled scores of each query row.

    Args:
        query: (B, H, Tq, D), bf16, fp16, fp32 or fp64.
        key: (B, G, Tk, D), same dtype; H is a multiple of G.
        mask, ranges, causal, window, scaling: as of `polynomial_attention`.
        backend: `reference` forms all scores, in float64 for float64 operands; any other name computes as the module
            says.

    Returns:
        m and v ≥ 0, (B, H, Tq) each, float32 (float64 for float64 operands); 0 for rows that see nothing. Both have
        gradients, of any order.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.

    >>> q, k = torch.randn(2, 1, 2, 5, 8).unbind()
    >>> [moment.shape for moment in score_moments(q, k, causal=True)]
    [torch.Size([1, 2, 5]), torch.Size([1, 2, 5])]
    """
    query, key = autocast_inputs(query, key)
    if not query.dim() == key.dim() == 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise InputError(
            f"query (B, H, Tq, D) and key (B, G, Tk, D) do not fit: got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if query.dtype != key.dtype or query.shape[1] % key.shape[1] != 0:
        raise InputError(
            f"query and key need one dtype, and query heads a multiple of key heads; got {query.dtype} "
            f"{tuple(query.shape)} and {key.dtype} {tuple(key.shape)}"
        )
    check_masks(mask, ranges, query, key.shape[2])
    scaling = 1.0 / math.sqrt(query.shape[3]) if scaling is None else scaling
    dtype, device = compute_dtype(query.dtype), query.device
    with without_autocast(device):
        q, k = query.to(dtype) * scaling, key.to(dtype)
        batch, heads, q_len, head_dim = q.shape
        k_len = k.shape[2]
        pattern = {"mask": mask, "ranges": ranges, "causal": causal, "window": window}
        exported = torch.compiler.is_exporting()  # with lengths that are known later
        by_key = window is None and (mask is None or mask.shape[1] == mask.shape[2] == 1)
        by_key = by_key and (ranges is None or ranges.shape[1] == 1)
        if backend == "reference" or (exported and (causal or not by_key)):
            return _of_scores(q, k, pattern)
        if by_key and q_len != 1 and (not causal or q_len == k_len):
            moments = _of_prefixes if causal else _of_keys
            grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], q_len, head_dim)
            mean, variance = moments(grouped, k, _visible_by_key(mask, ranges, k_len))
            return mean.flatten(1, 2), variance.flatten(1, 2)
        if torch.compiler.is_compiling() or batch * heads * q_len * k_len > _SCORES:
            return _of_passes(q, k, pattern)
        return _of_scores(q, k, pattern)


def _visible_by_key(mask: Tensor | None, ranges: Tensor | None, k_len: int) -> Tensor | None:
    """Returns which keys all rows of an entry see, bool (B or 1, 1, Tk, 1); None for all."""
    visible = None if mask is None else mask[:, :, 0, :, None]
    if ranges is not None:
        inside = within(ranges, slice(0, k_len))[:, :, 0, :, None]
        visible = inside if visible is None else visible & inside
    return visible


def _centered(k: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the visible keys less their mean, 0 where hidden, and their mean (B, G, 1, D)."""
    if visible is None:
        mean = k.mean(2, keepdim=True)
        return k - mean, mean
    k = torch.where(visible, k, 0.0)
    mean = k.sum(2, keepdim=True) / visible.sum(2, keepdim=True).clamp(min=1)
    return torch.where(visible, k - mean, 0.0), mean


def _of_keys(q: Tensor, k: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the moments of rows that see the same keys: q (B, G, R, Tq, D), (B, G, R, Tq) each."""
    shape = q.shape[:4]
    q = q.flatten(2, 3)
    centered, mean = _centered(k, visible)
    n = k.shape[2] if visible is None else visible.sum(2, keepdim=True).clamp(min=1).to(k.dtype)
    covariance = centered.transpose(-1, -2) @ (centered / n)
    variance = torch.linalg.vecdot(q @ covariance, q).clamp(min=0.0)
    return (q @ mean.transpose(-1, -2)).reshape(shape), variance.reshape(shape)


def _of_prefixes(q: Tensor, k: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the moments of causal rows: q (B, G, R, T, D), (B, G, R, T) each."""
    batch, groups, repeats, length, head_dim = q.shape
    n = count_visible(length, length, q.device, causal=True)[:, :, None]
    if visible is not None:
        n = visible.squeeze(-1).cumsum(-1)[:, :, None]
    centered, mean = _centered(k, visible)
    chunks = (length + _CHUNK - 1) // _CHUNK
    rows, keys = (torch.nn.functional.pad(x, (0, 0, 0, chunks * _CHUNK - length)) for x in (q, centered))
    rows = rows.reshape(batch, groups, repeats, chunks, _CHUNK, head_dim)
    keys = keys.reshape(batch, groups, 1, chunks, _CHUNK, head_dim)
    own = (rows @ keys.transpose(-1, -2)).tril()  # the scores of the row's own chunk
    sums, squares = keys.sum(-2), keys.transpose(-1, -2) @ keys
    sums, squares = sums.cumsum(3) - sums, squares.cumsum(3) - squares  # over the chunks before
    first = torch.linalg.vecdot(rows, sums.unsqueeze(-2)) + own.sum(-1)
    second = torch.linalg.vecdot(rows @ squares, rows) + own.square().sum(-1)
    first, second = (moment.flatten(3)[..., :length] / n.clamp(min=1) for moment in (first, second))
    shift = torch.linalg.vecdot(q, mean.unsqueeze(2)).where(n > 0, 0.0)
    return first + shift, (second - first.square()).clamp(min=0.0)


def _of_scores(q: Tensor, k: Tensor, pattern: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the moments of any rows, from all their scores."""
    heads, q_len, k_len = q.shape[1], q.shape[2], k.shape[2]
    grouped = q.reshape(q.shape[0], k.shape[1], heads // k.shape[1], q_len, q.shape[3])
    scores = (grouped @ k.transpose(-1, -2).unsqueeze(2)).flatten(1, 2)
    seen = visible(slice(0, q_len), slice(0, k_len), q.device, **pattern)
    return moments_of(scores, seen, count_visible(q_len, k_len, q.device, **pattern))


def moments_of(scores: Tensor, seen: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean and the variance of scores (B, H, rows, Tk) at hand, (B, H, rows) each.

    Args:
        scores: float.
        seen: bool, broadcastable to them; None for all. What is hidden may be anything.
        count: visible keys, at least 1, broadcastable to the result.
    """
    hidden = None if seen is None else ~seen
    if hidden is not None:
        scores = scores.masked_fill(hidden, 0.0)
    mean = scores.sum(-1) / count
    scores = scores - mean.unsqueeze(-1)
    if hidden is not None:
        scores = scores.masked_fill(hidden, 0.0)
    return mean, scores.square().sum(-1) / count


def _of_passes(q: Tensor, k: Tensor, pattern: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the moments of many rows under any mask: passes of the operator with values 1, which keep no scores."""
    ones = k.new_ones(*k.shape[:3], 1)
    settings: dict[str, Any] = {"scaling": 1.0, "normalizer": "mean", "monomial": True, **pattern}

    def power(exponent: int, center: Tensor | float) -> Tensor:
        coefficients = k.new_tensor([[0.0] * exponent + [1.0]])
        output: Tensor = polynomial_attention(q, k, ones, coefficients, center=center, **settings)
        return output.squeeze(-1).transpose(1, 2)

    mean = power(1, 0.0)
    return mean, power(2, mean)
