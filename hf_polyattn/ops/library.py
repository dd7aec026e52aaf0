"""`polyattn::attention`, the one operator behind which the fused backends run: schema, fake tensors, autograd.

Its arguments are the fields of `Call` in order, then the backend's name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS
from .call import Call

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor coefficients, Tensor? mask, Tensor? center, "
_SETTINGS = (
    "Tensor? radius, Tensor? seed, bool causal, SymInt? window, float scaling, SymInt power, str normalizer, "
    "bool clamp, float dropout, str backend"
)


@torch.library.custom_op("polyattn::attention", mutates_args=(), schema=f"({_TENSORS}{_SETTINGS}) -> Tensor")
def attention(*arguments: Any) -> Tensor:
    """Returns the output (B, Tq, H, Dv), contiguous, in the query's dtype."""
    *call, backend = arguments
    return BACKENDS[backend].load().forward(Call(*call))  # type: ignore[no-any-return]


@torch.library.custom_op(
    "polyattn::attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, {_TENSORS}{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention_backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Returns the gradients of query, key, value, coefficients and center (of shape (0,) if there is none)."""
    *call, backend = arguments
    return BACKENDS[backend].load().backward(grad_output, Call(*call))  # type: ignore[no-any-return]


@attention.register_fake
def _(*arguments: Any) -> Tensor:
    query, _, value, *_ = arguments
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[3]))  # type: ignore[no-any-return]


@attention_backward.register_fake
def _(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    query, key, value, coefficients, _, center, *_ = arguments
    grads = [tensor.new_empty(tensor.shape) for tensor in (query, key, value, coefficients)]
    return (*grads, coefficients.new_empty((0,)) if center is None else center.new_empty(center.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.settings = inputs[8:]


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors  # activation checkpointing recomputes them and hands them out once
    *grads, grad_center = attention_backward(grad_output, *tensors, *ctx.settings)
    has_center = tensors[5] is not None
    return (*grads, None, grad_center if has_center else None, *(None,) * (2 + len(ctx.settings)))


attention.register_autograd(_backward, setup_context=_setup_context)
