"""The softmax model that a patched one is trained to stay close to."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import InputError, PatchError
from ..patching.as_patched import note_weights
from ..patching.core import is_patched
from ..patching.patch import unpatch_model
from ..patching.patched import pretrained_model, require_in_memory
from ..patching.running import require_polynomial
from .batches import require_several
from .training import TrainingOptions, evaluating


def check_training(
    model: nn.Module, batches: Iterable[Any], teacher: nn.Module | None, options: TrainingOptions, *, role: str
) -> None:
    """Checks what `distill` and `align` are given.

    Args:
        model: to train.
        batches: to train on.
        teacher: None for a copy of it.
        options: how.
        role: what the model is called beside its teacher.

    Raises:
        PatchError: the model is not patched, not running its polynomials, or offloaded; or the teacher is patched.
        InputError: no steps, a single batch, or an accelerator that accumulates gradients: `train` takes one
            batch an update.
    """
    require_polynomial(model)
    require_in_memory(pretrained_model(model), "trained")
    if teacher is not None and is_patched(teacher):
        raise PatchError(f"the teacher is patched; give the softmax model, or None for a softmax copy of the {role}")
    require_several(batches)
    if options.steps < 1:
        raise InputError(f"steps must be at least 1, got {options.steps}")
    if options.accelerator is not None and options.accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            "this training takes one batch an update; use an Accelerator with gradient_accumulation_steps=1"
        )


@contextmanager
def teaching(model: nn.Module, teacher: nn.Module | None, accelerator: Any) -> Iterator[nn.Module]:
    """Gives the teacher, in eval mode and where the model trains; None takes a copy of the model."""
    if teacher is None:
        teacher = softmax_copy(model)
    note_weights(pretrained_model(model))  # a loaded model was not patched here
    teacher.to(next(model.parameters()).device if accelerator is None else accelerator.device)
    with evaluating(teacher):
        yield teacher


def softmax_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of a patched model with softmax restored."""
    copied: nn.Module = unpatch_model(copy.deepcopy(pretrained_model(model)))
    return copied
