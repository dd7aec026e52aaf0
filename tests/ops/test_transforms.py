"""Transforms of `torch.func` and forward-mode derivatives are right through `auto`, and refused by fused backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from error_budget import operands
from torch import Tensor
from torch.autograd import forward_ad

from hf_polyattn import BackendError, polynomial_attention

SETTINGS: dict[str, dict[str, Any]] = {
    "rsqrt-causal": {"causal": True},
    "l1-window": {"normalizer": "l1", "window": 3, "center": 0.3, "radius": 4.0, "clamp": True},
}
all_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def tensors(dtype: torch.dtype) -> list[Tensor]:
    made = operands((2, 4, 2, 5, 6), head_dim=8, value_dim=4, dtype=dtype)
    return [tensor.detach().to(dtype) for tensor in made]


def attend(backend: str = "auto", **settings: Any) -> Callable[..., Tensor]:
    def function(*arguments: Tensor) -> Tensor:
        output: Tensor = polynomial_attention(*arguments, backend=backend, **settings)
        return output

    return function


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = 1e-9 if expected.dtype == torch.float64 else 2e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def jacobian_product(function: Callable[..., Tensor], arguments: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """The directional derivative by autograd's backward pass twice, in float64."""
    leaves = [argument.double().requires_grad_() for argument in arguments]
    output = function(*leaves)
    weight = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, leaves, weight, create_graph=True)
    inner = sum((p * t.double()).sum() for p, t in zip(pulled, tangents, strict=True))
    (pushed,) = torch.autograd.grad(inner, weight)  # type: ignore[arg-type]
    return pushed


@all_settings
@dtypes
@pytest.mark.parametrize("which", [(0, 1, 2, 3), (3,), (1,)], ids=["all", "coefficients", "key"])
def test_tangents_pass_through(settings: dict[str, Any], dtype: torch.dtype, which: tuple[int, ...]) -> None:
    arguments = tensors(dtype)
    tangents = [torch.randn_like(a) if n in which else torch.zeros_like(a) for n, a in enumerate(arguments)]
    expected = jacobian_product(attend("reference", **settings), arguments, tangents).to(dtype)
    assert float(expected.abs().max()) > 1e-3

    _, pushed = torch.func.jvp(attend(**settings), tuple(arguments), tuple(tangents))
    close(pushed, expected)
    with forward_ad.dual_level():
        dual = [
            forward_ad.make_dual(argument, tangent) if n in which else argument
            for n, (argument, tangent) in enumerate(zip(arguments, tangents, strict=True))
        ]
        close(forward_ad.unpack_dual(attend(**settings)(*dual)).tangent, expected)


@all_settings
@dtypes
def test_reverse_mode_transforms_equal_autograd(settings: dict[str, Any], dtype: torch.dtype) -> None:
    arguments = tensors(dtype)

    def loss(*inner: Tensor) -> Tensor:
        return attend(**settings)(*inner).square().sum()

    leaves = [argument.clone().requires_grad_() for argument in arguments]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for actual, grad in zip(torch.func.grad(loss, argnums=(0, 1, 2, 3))(*arguments), expected, strict=True):
        close(actual, grad)

    per_entry = torch.func.vmap(torch.func.grad(lambda q, k, v: loss(q[None], k[None], v[None], arguments[3])))
    close(per_entry(*arguments[:3]), expected[0])
    rows = torch.func.jacrev(lambda c: attend(**settings)(*arguments[:3], c).sum((0, 1, 3)))(arguments[3])
    columns = torch.func.jacfwd(lambda c: attend(**settings)(*arguments[:3], c).sum((0, 1, 3)))(arguments[3])
    close(rows, columns)
    assert float(rows.abs().max()) > 1e-3


def test_second_derivatives_are_right_or_refused() -> None:
    arguments = tensors(torch.float64)
    small = arguments[0][:1, :1, :2].clone()
    others = [*(argument[:1, :, :2] for argument in arguments[1:3]), arguments[3]]

    def loss(query: Tensor, backend: str = "auto") -> Tensor:
        return attend(backend, causal=True)(query.expand(1, 4, 2, 8), *others).square().sum()

    expected = torch.autograd.functional.hessian(lambda query: loss(query, "reference"), small)
    close(torch.func.hessian(loss)(small), expected)
    assert float(expected.abs().max()) > 1e-3
    with pytest.raises(BackendError, match="first derivatives only"):
        torch.autograd.functional.hessian(loss, small)


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_a_fused_backend_asked_for_by_name_says_what_it_cannot(backend: str) -> None:
    arguments = tensors(torch.float32)
    function = attend(backend)
    function(*arguments)  # runs, without a transform
    with pytest.raises(BackendError, match=rf"{backend}.* runs under torch\.func\.grad.*backend='reference' or 'auto'"):
        torch.func.grad(lambda q: function(q, *arguments[1:]).sum())(arguments[0])
    with pytest.raises(BackendError, match=r"runs under torch\.func\.jvp"):
        torch.func.jvp(lambda q: function(q, *arguments[1:]), (arguments[0],), (arguments[0],))
    with forward_ad.dual_level(), pytest.raises(BackendError, match="forward-mode automatic differentiation"):
        function(forward_ad.make_dual(arguments[0], arguments[0]), *arguments[1:])
    with forward_ad.dual_level():  # nothing here carries a tangent
        function(*arguments)


def test_weights_of_a_patched_model_have_per_sample_gradients(pretrained: Any, polynomial: Any, batch: Any) -> None:
    model = polynomial(pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=1)).double()
    ids = batch("llama", count=2, length=8)["input_ids"][:, :3]
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
        out = torch.func.functional_call(model, weights, (ids[None],), {"use_cache": False})
        return out.logits.square().mean()

    found = torch.func.grad(loss)(weights, ids[0])
    model.zero_grad()
    loss(dict(model.named_parameters()), ids[0]).backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert sum("polyattn" in name for name in trained) == 3
    for name, grad in trained.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-9 * float(grad.abs().max()))


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "dual"])
def test_transforms_inside_of_compiled_code_are_right(transform: str) -> None:
    query, *others = tensors(torch.float64)

    def run(query: Tensor, backend: str = "auto") -> Tensor:
        def function(q: Tensor) -> Tensor:
            return attend(backend, causal=True)(q, *others)

        if transform == "jvp":
            return torch.func.jvp(function, (query,), (query.cos(),))[1]
        if transform == "grad":
            return torch.func.grad(lambda q: function(q).square().sum())(query)
        if transform == "vmap":
            return torch.func.vmap(function)(torch.stack([query, query.cos()]))
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(query, query.cos()))).tangent

    torch._dynamo.reset()
    close(torch.compile(run, backend="aot_eager")(query), run(query, "reference"))


def test_code_compiled_before_is_right_under_tangents() -> None:
    query, *others = tensors(torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: attend(causal=True)(q, *others), backend="aot_eager")
    compiled(query)
    expected = torch.func.jvp(lambda q: attend("reference", causal=True)(q, *others), (query,), (query.cos(),))[1]
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(compiled(forward_ad.make_dual(query, query.cos()))).tangent, expected)


def test_compiled_transforms_of_a_fused_backend_are_refused_by_name() -> None:
    query, *others = tensors(torch.float32)
    torch._dynamo.reset()
    function = torch.compile(
        lambda q: torch.func.jvp(lambda q: attend("chunked")(q, *others), (q,), (q,))[1], backend="eager"
    )
    with pytest.raises(Exception, match=r"runs under torch\.func\.jvp"):
        function(query)
