"""A module's gradients by one kernel: those of PyTorch in float64 within the error budget, and what is left to PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_fused_layer import LONG, PATTERNS, inputs, module, watched
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hf_polyattn.patching.core
from error_budget import excess
from hf_polyattn import BackendError, InputError
from hf_polyattn.patching.core import PolyAttention

SPECS = ("poly3", "poly6-l1", "poly3^4-mean")
TRAINED = {"none": {"delta", "center"}, "linear": {"delta", "center", "key_shift"}}
TRAINED["moments"] = {*TRAINED["linear"], "moments.weights", "moments.length_shift", "moments.squares"}


def found_by(layer: PolyAttention, tensors: tuple[Tensor, ...], settings: dict[str, Any]) -> dict[str, Tensor | None]:
    """The output, and the gradients of query, key, value and parameters for a fixed gradient of it."""
    leaves = dict(zip(("query", "key", "value"), (tensor.detach().requires_grad_() for tensor in tensors), strict=True))
    torch.manual_seed(0)  # of dropout
    output = layer(*leaves.values(), scaling=0.2, **settings)
    leaves |= {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    wanted = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output)
    grads = torch.autograd.grad(output, list(leaves.values()), wanted, allow_unused=True)
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def by_pytorch(layer: PolyAttention, *arguments: Any) -> dict[str, Tensor | None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_polyattn.patching.core, "fused_layer", lambda *args, **kwargs: None)
        patch.setattr(hf_polyattn.patching.core, "fused_centers", lambda *args, **kwargs: None)
        return found_by(layer, *arguments)


def excesses(layer: PolyAttention, pattern: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    settings = dict(pattern)
    tensors = inputs(settings, dtype)
    with watched() as took:
        found = found_by(layer.float(), tensors, settings)
    assert took == [True]
    same = by_pytorch(layer, tensors, settings)
    exact = found_by(layer.double(), tuple(tensor.double() for tensor in tensors), settings)
    assert found["output"].dtype == dtype
    assert {name for name, grad in found.items() if grad is None} == {n for n, grad in exact.items() if grad is None}
    return {name: excess(found[name], same[name], grad) for name, grad in exact.items() if grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row_shift", TRAINED)
@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_within_the_error_budget(spec: str, row_shift: str, dtype: torch.dtype) -> None:
    for name, pattern in {**PATTERNS, **LONG, "dropout": {"dropout": 0.2}}.items():
        layer = module(spec, row_shift)
        errors = excesses(layer, pattern, dtype)
        assert {*errors} == {"output", "query", "key", "value"} | TRAINED[row_shift], name
        assert max(errors.values()) <= 1.0, (name, errors)
