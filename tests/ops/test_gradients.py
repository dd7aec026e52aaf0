"""Gradients are those of finite differences, and all results are within the error budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from error_budget import excess, operands, outputs_and_gradients
from formula import DENSE, FEATURES, backends, noise, normalizers, padding
from kernel_cases import (
    BUMP,
    TAYLOR4,
    Case,
    Shape,
    errors,
    inputs,
    interval,
)
from torch import Tensor

from hf_polyattn import BackendError, polynomial_attention
from hf_polyattn.ops import chunked

pytestmark = pytest.mark.usefixtures("small_blocks")

# What a gradient can depend on.
MASKS = ["dense", "key-padding", "dense-mask", "causal", "window"]


@backends
@normalizers
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("power", [1, 4], ids=["power1", "power4-clamp"])
def test_gradients_match_finite_differences(backend: str, normalizer: str, mask: str, power: int) -> None:
    shape = (2, 2, 1, 3, 3)
    tensors = operands(shape, head_dim=2, value_dim=2, degree=2)
    center = noise(2, 2, 3).requires_grad_()
    settings = {**DENSE, **FEATURES}[mask](shape)

    def attend(*inputs: Tensor) -> Tensor:
        return polynomial_attention(
            *inputs[:4],
            center=inputs[4],
            radius=1.5,
            clamp=power > 1,
            power=power,
            normalizer=normalizer,
            backend=backend,
            **settings,
        )

    assert torch.autograd.gradcheck(attend, (*tensors, center))


@backends
def test_clamped_scores_have_no_gradient(backend: str) -> None:
    tensors = operands()
    inside = outputs_and_gradients(tensors, radius=100.0, clamp=True, backend=backend)
    outside = outputs_and_gradients(tensors, center=100.0, clamp=True, backend=backend)
    for name in ("query", "key"):
        assert inside[name].abs().max() > 0.0
        assert outside[name].abs().max() == 0.0


def test_gradient_of_the_radius_comes_from_the_reference() -> None:
    tensors = operands((1, 2, 1, 3, 3), head_dim=2, value_dim=2, degree=2)
    radius = (noise(2).abs() + 1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda radius: polynomial_attention(*tensors, radius=radius), (radius,))
    with pytest.raises(BackendError, match="'chunked' cannot run this call: it has no gradient for the radius"):
        polynomial_attention(*tensors, radius=radius, backend="chunked")


def test_second_derivatives_are_refused_by_the_fused_operator() -> None:
    tensors = operands()
    for backend, outcome in (("reference", None), ("chunked", "first derivatives only")):
        output = polynomial_attention(*tensors, backend=backend)
        (gradient,) = torch.autograd.grad(output.sum(), tensors[0], create_graph=True)
        if outcome is None:
            assert torch.autograd.grad(gradient.sum(), tensors[1])[0].abs().max() > 0.0
        else:
            with pytest.raises(BackendError, match=outcome):
                torch.autograd.grad(gradient.sum(), tensors[1])


SMOOTH = {
    "poly3": Case(coefficients=[0.0, 0.0, 0.0, 1.0]),
    "mean-causal": Case(lambda s: {"normalizer": "mean", "causal": True}, [0.3, -0.2, 0.5, 1.0]),
    "taylor4-l1-padding": Case(lambda s: {"normalizer": "l1", "mask": padding(s, rows=s[3])}, TAYLOR4),
    "poly3^16-l1-interval": Case(lambda s: interval(s, normalizer="l1", power=16), BUMP),
}
BUDGETED: list[tuple[Shape, str]] = [
    *(((16, 4, 2, 1, 1), case) for case in ("poly3", "mean-causal")),  # l1 of one key has no gradient
    *((shape, case) for shape in ((16, 4, 2, 7, 5), (4, 4, 2, 63, 65), (2, 4, 1, 129, 127)) for case in SMOOTH),
    *(((1, 2, 1, 1000, 1000), case) for case in ("poly3", "poly3^16-l1-interval")),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "case"), BUDGETED, ids=[f"B{s[0]}-H{s[1]}-G{s[2]}-T{s[3]}x{s[4]}-{case}" for s, case in BUDGETED]
)
def test_chunked_is_within_the_error_budget(
    shape: Shape, case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "_BLOCK_WEIGHTS_CPU", 32 * shape[4])
    monkeypatch.setattr(chunked, "_BAND_ROWS", 16)
    for name, error in errors(SMOOTH[case]._replace(shape=shape, dims=(64, 32)), dtype, "chunked").items():
        assert error <= 1.0, name


@pytest.mark.parametrize(
    "wrong",
    [{"mask": None}, {"normalizer": "mean"}, {"power": 2}, {"clamp": False}, {"center": 0.0}, {"radius": 4.0}],
    ids=lambda wrong: "-".join(wrong),
)
def test_error_budget_notices_what_is_dropped(wrong: dict[str, Any]) -> None:
    case = SMOOTH["poly3^16-l1-interval"]._replace(shape=(4, 4, 2, 63, 65), dims=(64, 32))
    tensors, settings = inputs(case, torch.bfloat16, 0, "cpu")
    settings["mask"] = padding((4, 4, 2, 63, 65))
    exact = outputs_and_gradients([tensor.double() for tensor in tensors], **settings, backend="reference")
    same_dtype = outputs_and_gradients(tensors, **settings, backend="reference")
    candidate = outputs_and_gradients(tensors, **{**settings, **wrong}, backend="chunked")
    for name in ("output", "query", "key", "value", "coefficients"):
        assert excess(candidate[name], same_dtype[name], exact[name]) > 2.0, name
