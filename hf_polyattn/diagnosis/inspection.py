"""What chosen query rows of an attention module do: their scores, what they see, and the norms of their weights.

The rows of an attention matrix A depend on their own scores only. So the Jacobian of the map from scores x to A is
block diagonal, one block J a row, and ‖A‖_F² and ‖∇A‖_F² are sums over rows of closed forms:

    softmax     J = diag(p) − p pᵀ             ‖J‖² = Σp² − 2Σp³ + (Σp²)²
    r fixed     J = diag(r w′)                 ‖J‖² = r² Σw′²
    l1          J = diag(d) − u (σ d)ᵀ         ‖J‖² = Σd² − 2Σuσd² + Σu² Σ(σd)²

with w′_j = dw_j/dx_j, z = ε + Σ|w|, u = w/z, d = w′/z, σ = sign w. No N × N × N tensor is formed.
Source of the norms: arXiv 2410.18613, Theorem 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.call import EPSILON, ROW_EXPONENTS
from ..patching.core import PolyAttention


def scaled_scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Returns x = scaling · q·k, (B, H, rows, Tk), in the dtype of query (B, H, rows, D) and key (B, G, Tk, D)."""
    batch, heads, rows, head_dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)
    return (grouped @ key.transpose(-1, -2)).reshape(batch, heads, rows, -1) * scaling


def interval_scores(layer: PolyAttention, query: Tensor, scores: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Returns t = (x − center_i) / radius_h of scores (B, H, rows, Tk) and what is visible, before any clamp."""
    config = layer.config
    if config.row_shift != "none" or config.spec.refinements:
        scores = scores - layer.centers_of(query, scores, visible, scaling).to(scores.dtype).unsqueeze(-1)
    elif config.interval:
        scores = scores - layer.center.to(scores.dtype)[:, None, None]
    return scores / layer.radius.to(scores.dtype)[:, None, None] if config.interval else scores


def weights_and_slopes(layer: PolyAttention, t: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Returns w = p(t)^s and dw/dx of t (B, H, rows, Tk), both 0 where not visible."""
    config = layer.config
    c = layer.changed_coefficients().to(t.dtype)[:, :, None, None]
    flat = t.abs() > 1.0
    if config.clamp:
        t = t.clamp(-1.0, 1.0)
    weight, slope = torch.zeros_like(t) + c[:, -1], torch.zeros_like(t)
    for k in range(c.shape[1] - 2, -1, -1):
        slope = slope * t + weight
        weight = weight * t + c[:, k]
    for _ in range(config.spec.power.bit_length() - 1):
        slope = 2.0 * weight * slope
        weight = weight * weight
    if config.interval:
        slope = slope / layer.radius.to(t.dtype)[:, None, None]
    if config.clamp:
        slope = slope.masked_fill(flat, 0.0)
    return weight.masked_fill(~visible, 0.0), slope.masked_fill(~visible, 0.0)


def polynomial_squares(weight: Tensor, slope: Tensor, visible: Tensor, normalizer: str) -> tuple[Tensor, Tensor]:
    """Returns the squared norms of each row's r·w and of its Jacobian, (B, H, rows).

    Args:
        weight, slope: of `weights_and_slopes`.
        visible: bool, broadcastable to them.
        normalizer: of the spec.
    """
    if normalizer == "l1":
        total = EPSILON + weight.abs().sum(-1, keepdim=True)
        u, d = weight / total, slope / total
        signed = weight.sign() * d
        square, steep = u.square().sum(-1), d.square().sum(-1)
        return square, steep - 2.0 * (u * d * signed).sum(-1) + square * signed.square().sum(-1)
    factor = visible.sum(-1).clamp(min=1).to(weight.dtype) ** (2.0 * ROW_EXPONENTS[normalizer])
    return factor * weight.square().sum(-1), factor * slope.square().sum(-1)


def softmax_squares(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the squared norms of each row's softmax and of its Jacobian, (B, H, rows); 0 where nothing is seen."""
    p = scores.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~visible, 0.0)
    square, cube = p.square().sum(-1), p.pow(3).sum(-1)
    return square, (square - 2.0 * cube + square.square()).clamp(min=0.0)
