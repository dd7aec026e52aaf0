"""What a call of the operator is to a kernel of backend `triton`: arguments, sizes, and how it is compiled and run."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..backends import INTERPRETED
from ..call import Call
from .arguments import Dropout, Operand, Scores, Static, Visibility
from .tuning import Configuration, configuration, keys

_MAX_ROW_STRIDE = 2**31 // 512  # elements; no tile has more rows than 256
# In the interpreter, which has no device: small blocks, so that short sequences cross block boundaries.
_INTERPRETED_CONFIGURATION = Configuration(block_m=16, block_n=16, num_warps=4, num_stages=1)
# A monomial of a higher degree is computed of the scaled score: q·k to that degree may overflow.
_MAX_FOLDED_DEGREE = 4


def launch(kernel: Any, programs: int, call: Call, tuned: Configuration, *arguments: Any, **static: Any) -> None:
    """Runs so many programs of a kernel."""
    with torch.cuda.device(call.query.device) if call.query.is_cuda else nullcontext():
        kernel[(programs,)](*arguments, **static, **compile_options(tuned))


def compile_options(tuned: Configuration) -> dict[str, Any]:
    """Returns what Triton's compiler is told beside the arguments. Its default for fused multiply-adds varies."""
    options = {"num_warps": tuned.num_warps, "num_stages": tuned.num_stages, "enable_fp_fusion": True}
    return options if tuned.max_registers is None else options | {"maxnreg": tuned.max_registers}


def configuration_of(kernel: str, call: Call) -> Configuration:
    """Returns how a kernel is compiled for a call."""
    if INTERPRETED:
        return _INTERPRETED_CONFIGURATION
    return configuration(kernel, table_keys(call), call.query.device)


def table_keys(call: Call) -> tuple[str, ...]:
    """Returns the keys of a tuning table that fit a call, the best first."""
    width = max(call.query.shape[3], call.value.shape[3])
    return keys(call.query.dtype, width, call.monomial, call.query.shape[1] > call.key.shape[1])


def static_of(call: Call, tuned: Configuration) -> Static:
    """Returns what a kernel is compiled for."""
    head_dim, value_dim = call.query.shape[3], call.value.shape[3]
    degree = call.coefficients.shape[1] - 1
    bare = call.monomial and call.power == 1 and call.center is None and not call.clamp
    ranged = 0 if call.ranges is None else 1 if call.ranges.shape[1] == 1 else 2
    return Static(
        degree=degree,
        squarings=call.power.bit_length() - 1,
        normalizer=call.normalizer,
        monomial=call.monomial,
        fold=bare and degree <= _MAX_FOLDED_DEGREE,
        clamp=call.clamp,
        causal=call.causal,
        ranged=ranged,
        q_even=call.query.shape[2] % tuned.block_m == 0,
        k_even=call.key.shape[2] % tuned.block_n == 0,
        scaled=call.query.dtype == torch.float16,
        precision="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        head_dim=head_dim,
        value_dim=value_dim,
        block_m=tuned.block_m,
        block_n=tuned.block_n,
    )


def operand_of(tensor: Tensor) -> Operand:
    """Returns a tensor (B, H, T, columns) with contiguous columns, whose tiles have 32-bit offsets; else a copy."""
    if tensor.stride(3) != 1 or tensor.stride(2) > _MAX_ROW_STRIDE:
        tensor = tensor.contiguous()
    return Operand(tensor, *tensor.stride()[:3])


def scores_of(call: Call) -> Scores:
    """Returns what makes t of a score."""
    center_strides = _broadcast_strides(call.center, 3)
    radius_stride = 0 if call.radius is None else call.radius.stride(0)
    coefficients = (call.coefficients, *call.coefficients.stride())
    fields: tuple[Any, ...] = (*coefficients, call.radius, radius_stride, call.center, *center_strides, call.scaling)
    return Scores(*fields)


def visibility_of(call: Call) -> Visibility:
    """Returns lengths and masks."""
    q_len, k_len = call.query.shape[2], call.key.shape[2]
    mask = None if call.mask is None else call.mask.view(torch.uint8)
    range_strides, mask_strides = _broadcast_strides(call.ranges, 3), _broadcast_strides(mask, 4)
    fields: tuple[Any, ...] = (q_len, k_len, call.window, call.ranges, *range_strides, mask, *mask_strides)
    return Visibility(*fields)


def _broadcast_strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    if tensor is None:
        return (0,) * dims
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def dropout_of(call: Call) -> Dropout | None:
    """Returns seed, threshold and scale; None without dropout."""
    if call.seed is None:
        return None
    return Dropout(call.seed, int(call.dropout * 2**32) - 2**31, 1.0 / (1.0 - call.dropout))


def blocks(length: int, block: int) -> int:
    """Returns how many blocks cover a length."""
    return -(-length // block)


def power_of_two(number: int) -> int:
    """Returns the least power of 2 that is not below a number."""
    return 1 << (number - 1).bit_length()
