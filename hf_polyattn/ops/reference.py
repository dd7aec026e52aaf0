"""Backend `reference`: the oracle. Plain PyTorch, differentiable everywhere, any device, any float dtype.

    x_ij  = scaling · q_i·k_j
    t_ij  = (x_ij − center_i) / radius_h          with clamp: limited to [−1, 1]
    w_ij  = m_ij · p_h(t_ij)^s                    p_h(t) = Σ_{k=0..P} c_hk t^k
    n_i   = max(1, Σ_j m_ij)
    out_i = r_i · Σ_j w_ij v_j                    r_i = n_i^(-1/2) | 1/n_i | 1 | 1/(ε + Σ_j |w_ij|), ε = 1e-37

Forms the whole (B, H, Tq, Tk) weights. Computes in float32 for bf16, fp16 and fp32 inputs, else in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import EPSILON, ROW_EXPONENTS, Call, without_autocast
from .dropout import dropout_scale
from .masks import pattern


def attention(call: Call) -> tuple[Tensor, Tensor]:
    """Returns the output (B, Tq, H, Dv) in the query's dtype and the weights r·w (B, H, Tq, Tk)."""
    batch, heads, q_len, _ = call.query.shape
    k_len = call.key.shape[2]
    dtype, device = call.compute_dtype, call.query.device

    with without_autocast(device):
        t = _by_key_head(call.query.to(dtype), call.key.to(dtype).transpose(-1, -2)) * call.scaling
        if call.center is not None:
            t = t - call.center.to(dtype).unsqueeze(-1)
        if call.radius is not None:
            t = t / call.radius.to(dtype)[:, None, None]
        if call.clamp:
            t = t.clamp(-1.0, 1.0)

        c = call.coefficients.to(dtype)[:, :, None, None]
        p = torch.zeros_like(t) + c[:, -1]
        for k in range(c.shape[1] - 2, -1, -1):
            p = p * t + c[:, k]
        visible = pattern(call, slice(0, batch), slice(0, heads), slice(0, q_len), slice(0, k_len))
        if visible is not None:  # before the power: a hidden p^s that overflows would make the gradient NaN
            p = p.masked_fill(~visible, 0.0)
        w = p
        for _ in range(call.power.bit_length() - 1):
            w = w * w

        weights = _normalized(w, visible, call.normalizer)
        if call.seed is not None:
            numbers = torch.arange(batch * heads * q_len, device=device).view(batch, heads, q_len)
            columns = torch.arange(k_len, device=device)
            weights = weights * dropout_scale(call.seed, numbers, columns, call.dropout)
        out = _by_key_head(weights, call.value.to(dtype))
    out = out.transpose(1, 2).contiguous()
    return out.to(call.query.dtype), weights


def _by_key_head(rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the products (B, H, Tq, Y) of (B, H, Tq, X) and (B, G, X, Y): heads that share a key head are more rows.

    In exports they are not: products of lengths in a shape would become guards on the lengths.
    """
    batch, heads, q_len, inner = rows.shape
    kv_heads = columns.shape[1]
    if kv_heads == heads:
        return rows @ columns
    if torch.compiler.is_exporting():
        split: Tensor = rows.unflatten(1, (kv_heads, heads // kv_heads))  # type: ignore[no-untyped-call]
        return (split @ columns.unsqueeze(2)).flatten(1, 2)
    merged = rows.reshape(batch, kv_heads, heads // kv_heads * q_len, inner) @ columns
    return merged.reshape(batch, heads, q_len, columns.shape[3])


def _normalized(w: Tensor, visible: Tensor | None, normalizer: str) -> Tensor:
    """Returns r_i w_ij. Divides by a row sum, as the derivative of its inverse overflows where it is small."""
    if normalizer == "l1":
        return w / (EPSILON + w.abs().sum(-1, keepdim=True))
    if visible is None:
        n = w.new_full((), max(1, w.shape[-1]))
    else:
        n = visible.sum(-1, keepdim=True).clamp(min=1).to(w.dtype)
    return w * n ** ROW_EXPONENTS[normalizer]
