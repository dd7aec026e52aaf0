"""`polyattn::attention`, the one operator behind which the fused backends run: schema, fake tensors, autograd.

Its arguments are the fields of `Call` in order, then the backend's name. A backend is a module with

    forward(call) -> (output, row_scale)
    backward(grad_output, output, row_scale, call, coefficients_grad=, center_grad=)
        -> gradients of query, key, value, coefficients and center, the last two 0 where they are not asked for

where the gradients of query, key and value lie as `empty_gradient` says; and row_scale, float32 (B, H, Tq) or float64
for float64 inputs, holds r_i of normalizer l1, 0 where all w are. The other normalizers need neither it nor the output
in backward: there both have shape (0,).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS
from .call import Call, compute_dtype, empty_gradient
from .modes import refuse_second_derivatives

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor coefficients, Tensor? mask, Tensor? ranges, Tensor? center, "
    "Tensor? radius, Tensor? seed, "
)
_SETTINGS = (
    "bool causal, SymInt? window, float scaling, SymInt power, str normalizer, bool clamp, bool monomial, "
    "float dropout, str backend"
)
_COEFFICIENTS, _CENTER, _NORMALIZER, _TENSOR_COUNT = 3, 6, 13, 9


# "polyattn"; a copy under another name, such as the Hub kernel, registers operators of its own.
_NAMESPACE = __name__.partition(".")[0].removeprefix("hf_")


@torch.library.custom_op(
    f"{_NAMESPACE}::attention", mutates_args=(), schema=f"({_TENSORS}{_SETTINGS}) -> (Tensor, Tensor)"
)
def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Returns the output (B, Tq, H, Dv), contiguous, in the query's dtype, and the row scale that backward needs."""
    *call, backend = arguments
    return BACKENDS[backend].load().forward(Call(*call))  # type: ignore[no-any-return]


@torch.library.custom_op(
    f"{_NAMESPACE}::attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_output, Tensor output, Tensor row_scale, bool coefficients_grad, bool center_grad, "
        f"{_TENSORS}{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def attention_backward(
    grad_output: Tensor, output: Tensor, row_scale: Tensor, coefficients_grad: bool, center_grad: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    """Returns the gradients of query, key, value, coefficients and center (of shape (0,) if there is none)."""
    *call, backend = arguments
    wanted = {"coefficients_grad": coefficients_grad, "center_grad": center_grad}
    grads: tuple[Tensor, ...]
    grads = BACKENDS[backend].load().backward(grad_output, output, row_scale, Call(*call), **wanted)
    return grads


@attention.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, _, value, *_ = arguments
    output = query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))
    l1 = arguments[_NORMALIZER] == "l1"
    return output, query.new_empty(query.shape[:3] if l1 else (0,), dtype=compute_dtype(query.dtype))


@attention_backward.register_fake
def _(
    grad_output: Tensor, output: Tensor, row_scale: Tensor, coefficients_grad: bool, center_grad: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    query, key, value, coefficients, *_ = arguments
    center = arguments[_CENTER]
    grads = [empty_gradient(operand) for operand in (query, key, value)]
    grads.append(coefficients.new_empty(coefficients.shape))
    return (*grads, coefficients.new_empty((0,)) if center is None else center.new_empty(center.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    attended, row_scale = output
    if inputs[_NORMALIZER] != "l1":  # nothing kept alive that backward does not need
        attended = row_scale
    ctx.save_for_backward(*inputs[:_TENSOR_COUNT], attended, row_scale)
    ctx.settings = inputs[_TENSOR_COUNT:]


def _backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, output, row_scale = ctx.saved_tensors  # activation checkpointing hands them out once
    wanted = (ctx.needs_input_grad[_COEFFICIENTS], ctx.needs_input_grad[_CENTER])
    *grads, grad_center = attention_backward(grad_output, output, row_scale, *wanted, *tensors, *ctx.settings)
    none = (None,) * (_TENSOR_COUNT + len(ctx.settings))
    center = None if tensors[_CENTER] is None else grad_center
    return (*grads, *none[len(grads) : _CENTER], center, *none[_CENTER + 1 :])


def _refuse_second_derivatives(ctx: Any, *gradients: Tensor) -> None:
    refuse_second_derivatives()


attention.register_autograd(_backward, setup_context=_setup_context)
attention_backward.register_autograd(_refuse_second_derivatives)
