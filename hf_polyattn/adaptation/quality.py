"""How close a polynomial model is to its softmax original: one number that needs no labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..patching.as_patched import warn_of_change
from ..patching.core import is_patched
from ..patching.masking import real_positions
from ..patching.patch import softmax_attention
from ..patching.patched import pretrained_model
from ..patching.running import require_polynomial
from .batches import require_several
from .capture import model_inputs
from .training import evaluating, rows_of

#: Returns the quality of a model, higher is better.
Quality = Callable[[nn.Module], float]


@torch.no_grad()
def similarity(model: nn.Module, batches: Iterable[Any], teacher: nn.Module | None = None) -> float:
    """Returns the mean cosine between what a patched model and its softmax teacher give; 1 is the same.

    Compared are the logits or, of a model without a head, the last hidden states, at every position that is not
    padding, both less the teacher's mean over the positions of the batch: what all positions share says nothing.

    Args:
        model: patched.
        batches: model inputs, see `calibrate`.
        teacher: a softmax model; None runs `model` itself under softmax: right while its weights are the
            pretrained, and warns once where they have changed since it was patched.

    Raises:
        PatchError: the model is not patched, or is not running its polynomials.
        InputError: no batches, a single batch, or outputs with neither logits nor hidden states.
    """
    if teacher is None or is_patched(model):
        require_polynomial(model)
    require_several(batches)
    if teacher is None:
        warn_of_change(pretrained_model(model), stacklevel=3)  # of `similarity`, and of torch's decorator around it
    total = count = 0.0
    with evaluating(model), nullcontext() if teacher is None else evaluating(teacher):
        for batch in batches:
            inputs = model_inputs(model, batch)
            ours = _answers(model, inputs)
            with softmax_attention(model) if teacher is None else nullcontext():
                softmax = _answers(model if teacher is None else teacher, inputs)
            visible = real_positions(inputs, decoder=pretrained_model(model).config.is_encoder_decoder)
            ours, softmax = (rows_of(states, visible) for states in (ours, softmax))
            mean = softmax.mean(0) if len(softmax) > 1 else torch.zeros_like(softmax[0])
            cosines = torch.cosine_similarity(ours - mean, softmax - mean, dim=-1)
            total, count = total + float(cosines.double().sum()), count + cosines.numel()
    if count == 0:
        raise InputError("no batches were given to compare the models on; pass an iterable of model inputs")
    return total / count


def _answers(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    extra = {"use_cache": False} if "use_cache" in inspect.signature(pretrained_model(model).forward).parameters else {}
    output = model(**{**extra, **inputs})
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)  # type: ignore[no-any-return]
    raise InputError(
        f"{type(model).__name__} gives {list(output)}, neither logits nor last_hidden_state; pass quality="
    )
