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

from .call import EPSILON, ROW_EXPONENTS, Call
from .dropout import dropout_scale
from .masks import pattern


def attention(call: Call) -> tuple[Tensor, Tensor]:
    """Returns the output (B, Tq, H, Dv) in the query's dtype and the weights r·w (B, H, Tq, Tk)."""
    batch, heads, q_len, head_dim = call.query.shape
    kv_heads, k_len, value_dim = call.key.shape[1], call.key.shape[2], call.value.shape[3]
    rows = heads // kv_heads * q_len  # the query heads that share a key head become more rows
    dtype, device = call.compute_dtype, call.query.device

    with torch.autocast(device_type=device.type, enabled=False):
        grouped = call.query.to(dtype).reshape(batch, kv_heads, rows, head_dim)
        scores = grouped @ call.key.to(dtype).transpose(-1, -2)
        t = scores.reshape(batch, heads, q_len, k_len) * call.scaling
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
        out = weights.reshape(batch, kv_heads, rows, k_len) @ call.value.to(dtype)
    out = out.reshape(batch, heads, q_len, value_dim).transpose(1, 2).contiguous()
    return out.to(call.query.dtype), weights


def _normalized(w: Tensor, visible: Tensor | None, normalizer: str) -> Tensor:
    """Returns r_i w_ij. Divides by a row sum, as the derivative of its inverse overflows where it is small."""
    if normalizer == "l1":
        return w / (EPSILON + w.abs().sum(-1, keepdim=True))
    if visible is None:
        n = w.new_full((), max(1, w.shape[-1]))
    else:
        n = visible.sum(-1, keepdim=True).clamp(min=1).to(w.dtype)
    return w * n ** ROW_EXPONENTS[normalizer]
