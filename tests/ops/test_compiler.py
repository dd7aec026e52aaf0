"""The operator under torch.library, torch.compile and autocast."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from error_budget import operands
from formula import SHAPE, backends, distance, make_call, noise, padding
from kernel_cases import (
    check_library_contract,
)
from torch import Tensor

from hf_polyattn import polynomial_attention
from hf_polyattn.ops.call import Call

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalizer": "l1", "power": 16, "clamp": True, "causal": True, "window": 3},
        {"mask": padding(SHAPE), "center": noise(4).float(), "radius": 2.0},
        {"dropout": 0.2},
    ],
    ids=["dense", "l1-causal", "padding-interval", "dropout"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_obeys_the_library_contract(settings: dict[str, Any], dtype: torch.dtype) -> None:
    call = make_call(operands(dtype=dtype), **settings)
    arguments = [getattr(call, name) for name in Call.__slots__]
    check_library_contract([*arguments, "chunked"])


def attend_causally(backend: str, *inputs: Tensor) -> Tensor:
    query, key, value, coefficients, center, mask = inputs
    return polynomial_attention(
        query, key, value, coefficients, mask=mask, causal=True, window=4, center=center, radius=2.0, clamp=True,
        power=2, normalizer="l1", backend=backend,
    )  # fmt: skip


@backends
def test_compiled_operator_equals_eager_at_every_length(backend: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend_causally, fullgraph=True, backend=counter)
    for length in (6, 9, 11, 13):
        tensors = [*operands((2, 4, 2, length, length)), noise(2, 4, length).requires_grad_()]
        mask = padding((2, 4, 2, length, length), rows=length)
        outputs = [run(backend, *tensors, mask) for run in (compiled, attend_causally)]
        results = [(output, *torch.autograd.grad(output.square().sum(), tensors)) for output in outputs]
        for compiled_result, eager_result in zip(*results, strict=True):
            assert distance(compiled_result, eager_result) < 1e-12
    assert counter.frame_count == 2  # the first length as a constant, then every length


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: g++")
def test_inductor_compiles_the_reference() -> None:
    torch._dynamo.reset()
    tensors = [*operands((2, 4, 2, 6, 6)), noise(2, 4, 6).requires_grad_()]
    mask = padding((2, 4, 2, 6, 6), rows=6)
    compiled = torch.compile(attend_causally, fullgraph=True)("reference", *tensors, mask)
    eager = attend_causally("reference", *tensors, mask)
    assert distance(compiled, eager) < 1e-12
    gradients = [torch.autograd.grad(output.square().sum(), tensors) for output in (compiled, eager)]
    for compiled_gradient, eager_gradient in zip(*gradients, strict=True):
        assert distance(compiled_gradient, eager_gradient) < 1e-12


@backends
def test_autocast_casts_the_operands_and_nothing_inside(backend: str) -> None:
    query, key, value, coefficients = operands(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = polynomial_attention(query, key.bfloat16(), value, coefficients, backend=backend)
        (gradient,) = torch.autograd.grad(output.sum(), query)
    expected = polynomial_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), coefficients, backend=backend)
    assert output.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    assert torch.equal(output, expected)
    exact = polynomial_attention(query, key, value, coefficients, backend=backend)
    assert 0.0 < distance(output.float(), exact) < 0.05
