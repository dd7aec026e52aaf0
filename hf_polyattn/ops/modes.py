"""What of PyTorch surrounds a call: autocast, who differentiates it and how, and whether anybody looks at all."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import BackendError
from . import backends
from .call import Call

_PLAIN = (Tensor, torch.nn.Parameter)


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts as `scaled_dot_product_attention` does under autocast: to the autocast dtype, float64 excepted."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def transform_of(call: Call) -> str | None:
    """Returns what differentiates the call by other means than autograd's backward pass; None if nothing does.

    An operator registered with autograd knows neither the transforms of `torch.func` nor tangents, which it drops
    without a word.
    """
    transform = _function_transform()
    if transform is not None:
        return transform
    if forward_ad._current_level < 0:
        return None
    if torch.compiler.is_compiling():  # what is traced hides whether it has a tangent
        return "forward-mode automatic differentiation"
    tensors = (call.query, call.key, call.value, call.coefficients, call.center, call.radius)
    return "forward-mode automatic differentiation" if any(t is not None and _is_dual(t) for t in tensors) else None


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of `torch.func` holds a tensor, or it has a tangent: its values do not say all."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or _is_dual(tensor)


def _is_dual(tensor: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


@backends.constant
def _function_transform() -> str | None:
    """Returns the innermost transform of `torch.func` that is going on; a compiler asks while it traces through it."""
    if torch._C._functorch.maybe_current_level() is None:
        return None
    return f"torch.func.{torch._C._functorch.peek_interpreter_stack().key().name.lower()}"


def is_watched() -> bool:
    """Whether a compiler, a tracer or a dispatch mode is there to see what runs."""
    return torch.compiler.is_compiling() or backends.is_traced() or torch._C._len_torch_dispatch_stack() > 0


def is_plain(*operands: Tensor | None) -> bool:
    """Whether nobody but autograd sees an operator: no tracer, transform, dispatch mode or tensor subclass."""
    if is_watched():
        return False
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return False
    return all(tensor is None or _is_here(tensor) for tensor in operands)


def _is_here(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers: no subclass, not offloaded, not partitioned by DeepSpeed's ZeRO-3."""
    return type(tensor) in _PLAIN and not tensor.is_meta and not hasattr(tensor, "ds_id")


def is_differentiated(*operands: Tensor | None) -> bool:
    """Whether autograd records what is computed of operands."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in operands)


def runs_at_once(*operands: Tensor | None) -> bool:
    """Whether nobody at all is there to see an operator.

    The backend is called directly then, as the dispatch through Python costs as much as a small attention.
    """
    return is_plain(*operands) and not is_differentiated(*operands)


def refuse_second_derivatives() -> NoReturn:
    """Raises BackendError: a backward pass is itself differentiated, and its backend has no derivatives of that."""
    raise BackendError(
        "the fused backends have first derivatives only, and this backward pass is itself differentiated "
        "(create_graph=True). Use backend='reference'."
    )
