"""What the operator refuses: operands, masks, ranges, center and radius that do not fit one another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..spec import MAX_DEGREE, NORMALIZERS, POWERS
from .call import compute_dtype
from .modes import is_transformed, is_watched

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_operands(query: Tensor, key: Tensor, value: Tensor, coefficients: Tensor) -> None:
    """Raises InputError if shapes, dtypes or devices do not fit one another."""
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


def check_settings(normalizer: str, power: int, window: int | None, dropout: float) -> None:
    """Raises InputError if one of them is none that there is."""
    if normalizer not in NORMALIZERS:
        raise InputError(f"normalizer {normalizer!r} is not one of {NORMALIZERS}")
    if power not in POWERS:
        raise InputError(f"power {power!r} is not one of {POWERS}")
    if window is not None and window < 1:
        raise InputError(f"window must be at least 1 key, got {window}")
    if not 0.0 <= dropout < 1.0:
        raise InputError(f"dropout must be a probability in [0, 1), got {dropout}")


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


def center_of_rows(center: float | Tensor, query: Tensor) -> Tensor | None:
    """Returns the center expanded to (B, H, Tq), None for 0; autograd undoes the expansion.

    Raises:
        InputError: another shape or device.
    """
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


def radius_of_heads(radius: float | Tensor, query: Tensor) -> Tensor | None:
    """Returns the radius as (H,), None for 1.

    Raises:
        InputError: it is not positive (of a tensor, where that is seen at once: on the CPU, outside of compilers and
            transforms), or has another shape or device.
    """
    heads = query.shape[1]
    if not isinstance(radius, Tensor):
        if not radius > 0.0:
            raise InputError(f"radius must be positive, got {radius}")
        return None if radius == 1.0 else _per_head(radius, query)
    if radius.shape != (heads,):
        raise InputError(f"radius must be a float or (H,) with H = {heads}; got {tuple(radius.shape)}")
    if radius.device != query.device:
        raise InputError(f"radius is on {radius.device}, query on {query.device}")
    # operators would cost more than a list
    if _can_be_read(radius) and not all(number > 0.0 for number in radius.tolist()):
        raise InputError(f"radius must be positive, got {radius.tolist()}")
    return radius


def _can_be_read(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values waits for no device, and nobody records or transforms what runs."""
    if tensor.device.type != "cpu" or is_watched() or is_transformed(tensor):
        return False
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _per_head(number: float, query: Tensor) -> Tensor:
    return torch.full((query.shape[1],), number, dtype=compute_dtype(query.dtype), device=query.device)
