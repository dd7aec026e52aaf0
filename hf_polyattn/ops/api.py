"""The public operator: validate once, choose a backend, call it."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import InputError
from ..spec import MAX_DEGREE, NORMALIZERS, POWERS, Normalizer
from . import backends
from .call import Call, compute_dtype
from .dropout import new_seed

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
    _check_operands(query, key, value, coefficients)
    heads, head_dim = query.shape[1], query.shape[3]
    check_masks(mask, ranges, query, key.shape[2])
    if normalizer not in NORMALIZERS:
        raise InputError(f"normalizer {normalizer!r} is not one of {NORMALIZERS}")
    if power not in POWERS:
        raise InputError(f"power {power!r} is not one of {POWERS}")
    if window is not None and window < 1:
        raise InputError(f"window must be at least 1 key, got {window}")
    if not 0.0 <= dropout < 1.0:
        raise InputError(f"dropout must be a probability in [0, 1), got {dropout}")

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
        center=_center(center, query),
        radius=_radius(radius, query),
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
            transform=_transform(call),
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


def _transform(call: Call) -> str | None:
    """Returns what differentiates the call by other means than autograd's backward pass; None if nothing does.

    An operator registered with autograd knows neither the transforms of `torch.func` nor tangents, which it drops
    without a word.
    """
    transform = _function_transform()
    if transform is not None:
        return transform
    if forward_ad._current_level < 0:
        return None
    if torch.compiler.is_compiling():  # what is traced hides whether it has a tangent
        return "forward-mode automatic differentiation"
    tensors = (call.query, call.key, call.value, call.coefficients, call.center, call.radius)
    return "forward-mode automatic differentiation" if any(t is not None and _is_dual(t) for t in tensors) else None


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of `torch.func` holds a tensor, or it has a tangent: its values do not say all."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or _is_dual(tensor)


def _is_dual(tensor: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


@backends.constant
def _function_transform() -> str | None:
    """Returns the innermost transform of `torch.func` that is going on; a compiler asks while it traces through it."""
    if torch._C._functorch.maybe_current_level() is None:
        return None
    return f"torch.func.{torch._C._functorch.peek_interpreter_stack().key().name.lower()}"


def runs_at_once(*operands: Tensor | None) -> bool:
    """Whether nobody is there to see an operator: no gradient, no tracer, no dispatch mode, no tensor subclass.

    The backend is called directly then, as the dispatch through Python costs as much as a small attention.
    """
    if torch.compiler.is_compiling() or backends.is_traced() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    tensors = [t for t in operands if t is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return all(type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta for tensor in tensors)


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts as `scaled_dot_product_attention` does under autocast: to the autocast dtype, float64 excepted."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _check_operands(query: Tensor, key: Tensor, value: Tensor, coefficients: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise InputError(f"query, key and value need 4 dimensions (batch, heads, length, head dim); got {shapes}")
    batch, heads, _, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim or key.shape[:3] != value.shape[:3] or head_dim == 0:
        raise InputError(
            f"shapes do not fit: {shapes}. Allowed: query (B, H, Tq, D), D >= 1, key (B, G, Tk, D), "
            "value (B, G, Tk, Dv)"
        )
    if key.shape[1] == 0 or heads % key.shape[1] != 0:
        raise InputError(f"query heads must be a multiple of key/value heads; got {heads} and {key.shape[1]}")
    if query.dtype not in _FLOATS or not query.dtype == key.dtype == value.dtype:
        raise InputError(
            f"query, key and value need one dtype of bfloat16, float16, float32, float64; got {query.dtype}, "
            f"{key.dtype}, {value.dtype}. Cast them, or run under torch.autocast."
        )
    if coefficients.dim() != 2 or coefficients.shape[0] not in (1, heads) or not coefficients.is_floating_point():
        raise InputError(
            f"coefficients must be float (H, P + 1) or (1, P + 1) with H = {heads}; "
            f"got {coefficients.dtype} {tuple(coefficients.shape)}"
        )
    if not 2 <= coefficients.shape[1] <= MAX_DEGREE + 1:
        raise InputError(f"the degree must be in 1..{MAX_DEGREE}; got {coefficients.shape[1]} coefficients a head")
    if not query.device == key.device == value.device == coefficients.device:
        raise InputError(
            f"query, key, value and coefficients must share a device; got {query.device}, {key.device}, "
            f"{value.device}, {coefficients.device}"
        )


def check_masks(mask: Tensor | None, ranges: Tensor | None, query: Tensor, k_len: int) -> None:
    """Raises InputError if a mask or ranges do not fit a query (B, H, Tq, D) and a number of keys."""
    batch, heads, q_len, _ = query.shape
    _check_mask(mask, batch, heads, q_len, k_len, query.device)
    _check_ranges(ranges, batch, q_len, query.device)


def _check_mask(mask: Tensor | None, batch: int, heads: int, q_len: int, k_len: int, device: torch.device) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise InputError(f"mask must be bool, True = visible; got {mask.dtype}. For an additive mask pass mask == 0.")
    if mask.device != device:
        raise InputError(f"mask is on {mask.device}, query on {device}")
    allowed = ((batch, 1), (heads, 1), (q_len, 1), (k_len,))
    if mask.dim() != 4 or not _fits(mask, allowed):
        raise InputError(
            f"mask {tuple(mask.shape)} does not fit; allowed: (B or 1, H or 1, Tq or 1, Tk) with B = {batch}, "
            f"H = {heads}, Tq = {q_len}, Tk = {k_len}"
        )


def _check_ranges(ranges: Tensor | None, batch: int, q_len: int, device: torch.device) -> None:
    if ranges is None:
        return
    if ranges.is_floating_point() or ranges.dtype == torch.bool:
        raise InputError(f"ranges must be int, the start and stop of the visible keys; got {ranges.dtype}")
    if ranges.device != device:
        raise InputError(f"ranges are on {ranges.device}, query on {device}")
    if ranges.dim() != 3 or not _fits(ranges, ((batch, 1), (q_len, 1), (2,))):
        raise InputError(
            f"ranges {tuple(ranges.shape)} do not fit; allowed: (B or 1, Tq or 1, 2) with B = {batch}, Tq = {q_len}"
        )


def _fits(tensor: Tensor, allowed: tuple[tuple[int, ...], ...]) -> bool:
    """Whether each size is an allowed one.

    The size of the operands comes first: that a symbolic size equals itself is known, and adds no guard to an export.
    """
    return all(any(size == one for one in sizes) for size, sizes in zip(tensor.shape, allowed, strict=True))


def _center(center: float | Tensor, query: Tensor) -> Tensor | None:
    """Returns the center expanded to (B, H, Tq), None for 0; autograd undoes the expansion."""
    batch, heads, q_len, _ = query.shape
    if not isinstance(center, Tensor):
        if center == 0.0:
            return None
        center = _per_head(center, query)
    if center.dim() == 1 and center.shape[0] == heads:
        center = center[None, :, None]
    elif center.dim() != 3 or center.shape != (batch, heads, q_len):  # by dim() first, see `_fits`
        raise InputError(
            f"center must be a float, (H,) or (B, H, Tq) with B = {batch}, H = {heads}, Tq = {q_len}; "
            f"got {tuple(center.shape)}"
        )
    if center.device != query.device:
        raise InputError(f"center is on {center.device}, query on {query.device}")
    return center.expand(batch, heads, q_len)


def _radius(radius: float | Tensor, query: Tensor) -> Tensor | None:
    """Returns the radius as (H,), None for 1."""
    heads = query.shape[1]
    if not isinstance(radius, Tensor):
        if not radius > 0.0:
            raise InputError(f"radius must be positive, got {radius}")
        return None if radius == 1.0 else _per_head(radius, query)
    if radius.shape != (heads,):
        raise InputError(f"radius must be a float or (H,) with H = {heads}; got {tuple(radius.shape)}")
    if radius.device != query.device:
        raise InputError(f"radius is on {radius.device}, query on {query.device}")
    return radius


def _per_head(number: float, query: Tensor) -> Tensor:
    return torch.full((query.shape[1],), number, dtype=compute_dtype(query.dtype), device=query.device)
