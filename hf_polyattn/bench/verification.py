"""Nothing is timed that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import PolyAttnError

_ROWS = 1024


class VerificationError(PolyAttnError):
    """A backend whose result is not that of the oracle within the error budget; it is not timed."""


def verify(attend: Callable[..., Tensor], tensors: list[Tensor], name: str) -> None:
    """Compares with the float64 oracle: the last 1,024 rows of the output of one batch entry, of a pass over all of it,
    and the gradients of its first 512 tokens.

    An error may be at most twice that of the same-dtype reference, plus one unit in the last place. All three are root
    mean squares: the largest error of a few thousand elements is luck, and one wrong element shows in both.

    Raises:
        VerificationError: an error is larger.
    """

    def results(part: list[Tensor], gradients: bool, **options: Any) -> list[Tensor]:
        if not gradients and options:  # the oracle keeps all the scores of its rows
            part = [part[0][:, :, -_ROWS:], *part[1:]]
        leaves = [tensor.detach().requires_grad_(gradients) for tensor in part]
        with torch.set_grad_enabled(gradients):
            output = attend(*leaves, **options)
        return [*torch.autograd.grad(output.sum(), leaves)] if gradients else [output[:, -_ROWS:]]

    def size(tensor: Tensor) -> float:
        return float(tensor.double().square().mean().sqrt())

    for gradients, part in ((False, [t[:1] for t in tensors]), (True, [t[:1, :, :512] for t in tensors])):
        exact = results([tensor.double() for tensor in part], gradients, backend="reference")
        same_dtype = results(part, gradients, backend="reference")
        for ours, reference, truth in zip(results(part, gradients), same_dtype, exact, strict=True):
            error, budget = (
                size(ours - truth),
                2.0 * size(reference - truth) + torch.finfo(ours.dtype).eps * size(truth),
            )
            if not error <= budget:
                raise VerificationError(f"{name}: error {error:.3g} exceeds the budget {budget:.3g}; not timed")
