"""The public operator: validate once, choose a backend, call it."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from ..spec import Normalizer
from . import backends
from .call import Call
from .checks import center_of_rows, check_masks, check_operands, check_settings, radius_of_heads
from .dropout import new_seed
from .modes import autocast_inputs, runs_at_once, transform_of


@overload
def polynomial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    *,
    mask: Tensor | None = ...,
    ranges: Tensor | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    scaling: float | None = ...,
    power: int = ...,
    normalizer: Normalizer = ...,
    center: float | Tensor = ...,
    radius: float | Tensor = ...,
    clamp: bool = ...,
    monomial: bool = ...,
    dropout: float = ...,
    backend: str = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...


@overload
def polynomial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    *,
    mask: Tensor | None = ...,
    ranges: Tensor | None = ...,
    causal: bool = ...,
    window: int | None = ...,
    scaling: float | None = ...,
    power: int = ...,
    normalizer: Normalizer = ...,
    center: float | Tensor = ...,
    radius: float | Tensor = ...,
    clamp: bool = ...,
    monomial: bool = ...,
    dropout: float = ...,
    backend: str = ...,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def polynomial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    *,
    mask: Tensor | None = None,
    ranges: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scaling: float | None = None,
    power: int = 1,
    normalizer: Normalizer = "rsqrt",
    center: float | Tensor = 0.0,
    radius: float | Tensor = 1.0,
    clamp: bool = False,
    monomial: bool = False,
    dropout: float = 0.0,
    backend: str = "auto",
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns out_i = r_i · Σ_j m_ij p_h(t_ij)^s v_j with t_ij = (scaling · q_i·k_j − center_i) / radius_h.

    Args:
        query: (B, H, Tq, D), bf16, fp16, fp32 or fp64.
        key: (B, G, Tk, D), same dtype; H is a multiple of G, and keys are never expanded.
        value: (B, G, Tk, Dv), same dtype.
        coefficients: (H, P + 1), or (1, P + 1) shared by the heads, float; ascending powers of t, P in 1..8.
        mask: bool (B or 1, H or 1, Tq or 1, Tk), True = visible. It multiplies after the polynomial; a row
            that sees nothing gives zeros.
        ranges: int (B or 1, Tq or 1, 2): query i sees keys start <= j < stop. Padding and packed sequences without
            a mask of the size Tq × Tk; see `packed_ranges`.
        causal: query i sees keys j <= i, aligned top-left.
        window: query i sees keys with |i - j| < window.
        scaling: of the scores; D^(-1/2) if None.
        power: s, 1, 2, 4, 8, 16 or 32, by squaring.
        normalizer: row scale r_i: rsqrt n_i^(-1/2), mean 1/n_i, none 1, l1 1/(1e-37 + Σ_j |w_ij|), with n_i the
            number of visible keys of the row, at least 1.
        center: float, (H,) or (B, H, Tq), in units of the scaled scores; differentiable.
        radius: float or (H,), positive, in units of the scaled scores.
        clamp: limit t to [-1, 1].
        monomial: take all coefficients but the highest as 0; they are not read and get gradient 0.
        dropout: probability in [0, 1) that an attention weight is dropped after normalization.
        backend: `auto` or a name in `hf_polyattn.ops.BACKENDS`; one asked for by name never falls back.
        return_weights: also return the attention weights r_i w_ij, (B, H, Tq, Tk), float32 or float64.

    Returns:
        (B, Tq, H, Dv) contiguous, in the query's dtype; with return_weights, that and the weights.

    Raises:
        InputError: shapes, dtypes, devices or settings that do not fit.
        BackendError: the named backend does not exist or cannot run this call.

    Source: arXiv 2410.18613; DESIGN.md, "The mathematics".

    >>> q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    >>> polynomial_attention(q, k, v, torch.tensor([[0.0, 0.0, 0.0, 1.0]])).shape
    torch.Size([1, 5, 2, 8])
    """
    query, key, value = autocast_inputs(query, key, value)
    check_operands(query, key, value, coefficients)
    heads, head_dim = query.shape[1], query.shape[3]
    check_masks(mask, ranges, query, key.shape[2])
    check_settings(normalizer, power, window, dropout)

    coefficients = coefficients.expand(heads, -1)
    if monomial:
        coefficients = torch.nn.functional.pad(coefficients[:, -1:], (coefficients.shape[1] - 1, 0))
    call = Call(
        query=query,
        key=key,
        value=value,
        coefficients=coefficients,
        mask=mask,
        ranges=None if ranges is None else ranges.to(torch.int32),
        center=center_of_rows(center, query),
        radius=radius_of_heads(radius, query),
        seed=new_seed(query.device) if dropout > 0.0 else None,
        causal=causal,
        window=window,
        scaling=1.0 / math.sqrt(head_dim) if scaling is None else float(scaling),
        power=power,
        normalizer=normalizer,
        clamp=clamp,
        monomial=monomial,
        dropout=dropout,
    )
    name = backends.select(
        backend,
        backends.Problem(
            device=query.device.type,
            dtype=query.dtype,
            normalizer=normalizer,
            power=power,
            return_weights=return_weights,
            radius_grad=call.radius is not None and call.radius.requires_grad,
            head_dim=head_dim,
            value_dim=value.shape[3],
            transform=transform_of(call),
        ),
    )
    if name == "reference":
        from . import reference

        output, weights = reference.attention(call)
        return (output, weights) if return_weights else output

    if runs_at_once(call.query, call.key, call.value, call.coefficients, call.center):
        eager: Tensor = backends.BACKENDS[name].load().forward(call)[0]
        return eager

    from . import library

    fused, _ = library.attention(
        call.query, call.key, call.value, call.coefficients, call.mask, call.ranges, call.center, call.radius,
        call.seed, call.causal, call.window, call.scaling, call.power, call.normalizer, call.clamp, call.monomial,
        call.dropout, name,
    )  # fmt: skip
    return fused  # type: ignore[no-any-return]
