"""The operator computes the formula of DESIGN.md in every backend that runs in float64."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from error_budget import operands
from formula import FEATURES, SHAPE, backends, distance, features, naive, normalizers, padding
from kernel_cases import (
    Shape,
)

from hf_polyattn import polynomial_attention
from hf_polyattn.spec import POWERS

pytestmark = pytest.mark.usefixtures("small_blocks")


@backends
@features
@pytest.mark.parametrize("shape", [SHAPE, (2, 4, 1, 7, 5), (1, 3, 3, 6, 6)], ids=["Tq<Tk", "Tq>Tk", "square"])
def test_every_feature_matches_the_formula(backend: str, feature: str, shape: Shape) -> None:
    tensors, settings = operands(shape), FEATURES[feature](shape)
    expected = naive(*tensors, **settings)
    assert distance(polynomial_attention(*tensors, **settings, backend=backend), expected) < 1e-12
    assert distance(polynomial_attention(*tensors, backend=backend), expected) > 1e-2


@backends
@normalizers
@pytest.mark.parametrize("power", POWERS)
def test_every_normalizer_and_power_matches_the_formula(backend: str, normalizer: str, power: int) -> None:
    tensors = operands()
    settings = {"causal": True, "mask": padding(SHAPE), "clamp": True}
    expected = naive(*tensors, **settings, normalizer=normalizer, power=power)
    output = polynomial_attention(*tensors, **settings, normalizer=normalizer, power=power, backend=backend)
    assert distance(output, expected) < 1e-11

    other_power = naive(*tensors, **settings, normalizer=normalizer, power=2 if power == 1 else power // 2)
    other_normalizer = naive(*tensors, **settings, normalizer="mean" if normalizer == "l1" else "l1", power=power)
    assert distance(other_power, expected) > 1e-2
    assert distance(other_normalizer, expected) > 1e-2


@backends
@pytest.mark.parametrize("degree", range(1, 9))
def test_every_degree_matches_the_formula(backend: str, degree: int) -> None:
    tensors = operands(degree=degree)
    expected = naive(*tensors)
    assert distance(polynomial_attention(*tensors, backend=backend), expected) < 1e-12
    for k in range(degree + 1):
        changed = tensors[3].detach().clone()
        changed[:, k] += 0.1
        assert distance(polynomial_attention(*tensors[:3], changed, backend=backend), expected) > 1e-6


@backends
def test_one_row_of_coefficients_serves_all_heads(backend: str) -> None:
    query, key, value, coefficients = operands()
    shared = coefficients[:1].detach().requires_grad_()
    output = polynomial_attention(query, key, value, shared, backend=backend)
    expanded = polynomial_attention(query, key, value, shared.expand(4, -1), backend=backend)
    assert torch.equal(output, expanded)
    assert torch.autograd.grad(output.sum(), shared)[0].shape == shared.shape


@backends
def test_query_head_reads_the_key_head_of_its_group(backend: str) -> None:
    query, key, value, coefficients = operands()
    expanded = polynomial_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), coefficients, backend=backend
    )
    interleaved = polynomial_attention(
        query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1), coefficients, backend=backend
    )
    output = polynomial_attention(query, key, value, coefficients, backend=backend)
    assert distance(output, expanded) < 1e-12
    assert distance(output, interleaved) > 1e-2


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_output_is_contiguous_and_in_the_dtype_of_the_query(backend: str, dtype: torch.dtype) -> None:
    output = polynomial_attention(*operands(dtype=dtype), backend=backend)
    assert output.shape == (2, 5, 4, 3)
    assert output.is_contiguous()
    assert output.dtype == dtype


@normalizers
def test_returned_weights_are_those_that_make_the_output(normalizer: str) -> None:
    tensors = operands()
    settings = {"causal": True, "normalizer": normalizer}
    output, weights = polynomial_attention(*tensors, **settings, return_weights=True)
    assert weights.shape == (2, 4, 5, 7)
    expanded = tensors[2].repeat_interleave(2, 1)
    assert distance(output, (weights @ expanded).transpose(1, 2)) < 1e-12
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))
    assert weights.tril().abs().min(dim=-1).values.max() >= 0.0
    row_sums = weights.abs().sum(-1)
    assert bool(torch.allclose(row_sums, torch.ones_like(row_sums))) is (normalizer == "l1")


def test_returned_weights_of_half_precision_are_float32() -> None:
    output, weights = polynomial_attention(*operands(dtype=torch.bfloat16), return_weights=True)
    assert (output.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
