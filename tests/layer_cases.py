"""Attention modules with row shifts, and the calls on which their fused kernels are compared with PyTorch's formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_polyattn.patching.core
from hf_polyattn import PolyAttentionConfig
from hf_polyattn.patching.core import PolyAttention

B, H, D = 3, 4, 20  # no whole vector
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def operands(q_len: int, k_len: int, dtype: torch.dtype, groups: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    query, key = (
        torch.randn(B, length, heads, D, generator=generator).transpose(1, 2)  # heads inside of tokens
        for heads, length in ((H, q_len), (groups, k_len))
    )
    return query.to(dtype), key.to(dtype)


def ranges_of(rows: int, k_len: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    ends = torch.randint(0, k_len + 1, (B, rows, 2), generator=generator).sort(-1).values
    ends[1] = 5  # empty
    return ends


PATTERNS: dict[str, dict[str, Any]] = {
    "all": {},
    "all, few keys": {"k_len": 9},
    "padding": {"ranges": ranges_of(1, 40)},
    "ranges by row": {"ranges": ranges_of(40, 40)},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 7},
    "decode": {"q_len": 1},
    "cross": {"q_len": 11, "k_len": 50},
}


def module(spec: str, row_shift: str = "moments", clamp: bool = True) -> PolyAttention:
    generator = torch.Generator().manual_seed(0)
    squares = 3 if row_shift == "moments" else 0
    config = PolyAttentionConfig(spec, interval=True, row_shift=row_shift, squares=squares, clamp=clamp)
    layer = PolyAttention(config, H, D)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("radius"):
                parameter.copy_(2.0 + torch.rand(parameter.shape, generator=generator))
            elif not name.endswith("lengths"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        for part in (layer, *(layer.refinements or ())):
            part.coefficients[:, 0] += 1.0  # weights of one sign, so that row sums are well conditioned
        if layer.moments is not None:
            layer.moments.scales.abs_().add_(0.5)
            layer.moments.lengths.copy_(torch.tensor([3.0, 30.0]))
    return layer


@contextmanager
def watched() -> Iterator[list[bool]]:
    """Gives whether the kernel took each call."""
    took: list[bool] = []
    fused = hf_polyattn.patching.core.fused_layer

    def seen(*arguments: Any, **settings: Any) -> Tensor | None:
        found = fused(*arguments, **settings)
        took.append(found is not None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_polyattn.patching.core, "fused_layer", seen)
        yield took


def inputs(settings: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    query, key = operands(settings.pop("q_len", 40), settings.pop("k_len", 40), dtype)
    value = torch.randn(*key.shape[:3], 12, generator=torch.Generator().manual_seed(3)).to(dtype)
    return query, key, value


def vars_of(layer: PolyAttention) -> dict[str, Any]:
    return {name: getattr(layer.config, name) for name in layer.config.__dataclass_fields__}


def error_of(
    layer: PolyAttention,
    pattern: dict[str, Any],
    dtype: torch.dtype,
    device: str = "cpu",
    scaling: float = 0.2,
    entries: int = B,
) -> float:
    """The largest error of a module's output, which one kernel has to give, over the largest number in it."""
    settings = dict(pattern)
    tensors = [tensor[:entries].to(device) for tensor in inputs(settings, dtype)]
    settings = {name: x[:entries].to(device) if isinstance(x, Tensor) else x for name, x in settings.items()}
    with watched() as took, torch.no_grad():
        found = layer.float().to(device)(*tensors, scaling=scaling, **settings)
        exact = layer.double()(*(tensor.double() for tensor in tensors), scaling=scaling, **settings)
    assert took[:1] == [True]
    assert found.dtype == dtype
    assert found.is_contiguous()
    return float((found.double() - exact).abs().max() / exact.abs().max())
