"""Random operands for the operator, and the error that a backend may make on them."""

from __future__ import annotations

from typing import Any

import torch
from budget import excess
from torch import Tensor

from hf_polyattn.ops import polynomial_attention

__all__ = ["excess", "operands", "outputs_and_gradients"]


def operands(
    shape: tuple[int, int, int, int, int] = (2, 4, 2, 5, 7),
    *,
    head_dim: int = 4,
    value_dim: int = 3,
    degree: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """Returns query, key, value and coefficients for B, H, G, Tq, Tk; laid out (B, T, H, D) as Transformers does.

    Coefficients are float32 for dtypes below it.
    """
    batch, heads, groups, q_len, k_len = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tensors = [
        draw(batch, q_len, heads, head_dim).to(dtype).transpose(1, 2),
        draw(batch, k_len, groups, head_dim).to(dtype).transpose(1, 2),
        draw(batch, k_len, groups, value_dim).to(dtype).transpose(1, 2),
        draw(heads, degree + 1).to(torch.float64 if dtype == torch.float64 else torch.float32),
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def outputs_and_gradients(tensors: list[Tensor], *, grad_scale: float = 1.0, **settings: Any) -> dict[str, Tensor]:
    """Returns the output, and the gradients of the operands and of a center tensor, for a fixed random dO."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    names = ["query", "key", "value", "coefficients"]
    if isinstance(settings.get("center"), Tensor):
        settings["center"] = settings["center"].detach().requires_grad_()
        leaves.append(settings["center"])
        names.append("center")
    output = polynomial_attention(*leaves[:4], **settings)
    grad_output = grad_scale * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(output, leaves, grad_output.to(output))
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}
