"""Optimizers that go on from a checkpoint of before polynomials trained by δ.

The optimizer of such a checkpoint remembers gradients of coefficients; by position they would become those of δ, whose
units are others. A state dict without δ marks the parameter, and the next step first forgets what is remembered of it.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_MARK = "_polyattn_untrained"
_installed: list[Any] = []


def mark_untrained(delta: nn.Parameter) -> None:
    """Notes that a parameter is new to the checkpoint that its module was loaded from."""
    setattr(delta, _MARK, True)
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_forget))


def _forget(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    found = False
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not hasattr(parameter, _MARK):
                continue
            delattr(parameter, _MARK)
            for tensor in optimizer.state.get(parameter, {}).values():
                if isinstance(tensor, Tensor):
                    found = found or bool(tensor.any())
                    tensor.zero_()
    if found:
        warnings.warn(
            "the optimizer goes on from a checkpoint of an earlier hf_polyattn, which trained the coefficients of "
            "polynomials themselves: for polynomials it starts anew, everything else is as it was.",
            stacklevel=4,
        )
