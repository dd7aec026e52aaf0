"""The centers of rows, by one fused kernel where there is one: of a call that nobody differentiates or records.

The formula is that of `patching.row_shift`, which computes it in PyTorch everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends
from .api import autocast_inputs, check_masks, is_transformed, runs_at_once

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Beyond so many rows that see different keys, matrix products of whole chunks are faster than the kernel.
LONGEST = 512


@dataclass(frozen=True, slots=True)
class MomentWeights:
    """What the moments of a row are weighed by; R squares, F = 8 + R features.

    Attributes:
        weights: (H, F), nats a unit of each feature.
        means: (H, F), of the features.
        length_shift: (H, D).
        squares: (H, R, D).
        lengths: the fewest and the most keys between which the count of a row is held.
        alpha: the row scale is n^(−alpha).
    """

    weights: Tensor
    means: Tensor
    length_shift: Tensor
    squares: Tensor
    lengths: tuple[float, float]
    alpha: float


def fused_centers(
    query: Tensor,
    key: Tensor,
    center: Tensor,
    key_shift: Tensor,
    parameters: Sequence[Tensor] = (),
    weigh: Callable[[], MomentWeights] | None = None,
    *,
    mask: Tensor | None,
    ranges: Tensor | None,
    causal: bool,
    window: int | None,
    scaling: float,
    backend: str,
) -> Tensor | None:
    """Returns the centers of all rows, (B, H, Tq), float32; None where no kernel has them, or PyTorch is faster.

    Args:
        query: (B, H, Tq, D).
        key: (B, G, Tk, D).
        center: (H,), float32.
        key_shift: (H, D), float32.
        parameters: of the moments.
        weigh: gives what the moments are weighed by; None for the key shift alone.
        mask, ranges, causal, window, scaling, backend: as of `polynomial_attention`.

    Raises:
        InputError: ranges that do not fit.
    """
    if query.device.type != "cpu" or mask is not None or backend not in ("auto", "cpu"):
        return None
    query, key = autocast_inputs(query, key)
    tensors = (query, key, center, key_shift, *parameters)
    if not runs_at_once(*tensors) or any(map(is_transformed, tensors)) or not _fits(query, key, key_shift):
        return None
    if backends.INTERPRETED or not backends.BACKENDS["cpu"].usable():
        return None
    if weigh is not None:
        differ = causal or window is not None or (ranges is not None and ranges.shape[1] > 1)
        if differ and query.shape[2] > LONGEST:
            return None
        check_masks(None, ranges, query, key.shape[2])
    moments = None if weigh is None else weigh()
    kernels = backends.BACKENDS["cpu"].load()
    found: Tensor = kernels.row_centers(query, key, center, key_shift, moments, ranges, causal, window, scaling)
    return found


def _fits(query: Tensor, key: Tensor, key_shift: Tensor) -> bool:
    """Whether there is nothing that the operator will refuse, and explain."""
    if query.dtype not in _DTYPES or query.dtype != key.dtype or not query.dim() == key.dim() == 4:
        return False
    same = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3] and query.shape[1::2] == key_shift.shape
    return same and key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0
