"""Distillation: training a patched model, end to end, to answer as its softmax teacher does.

The loss compares what the two models compute on the same batch, padding left out:

    loss = mean over layers of ‖h_student − h_teacher‖² / ‖h_teacher − mean h_teacher‖²  +  KL(teacher ‖ student)

over the hidden states of every layer and, where the model has a head, over its logits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..patching.masking import real_positions
from ..patching.patched import patched_layers, spec_of
from .layerwise import match_layers, matchable
from .teacher import check_training, teaching
from .training import TrainingOptions, TrainingReport, TrainingState, param_groups, rows_of, train

_EPSILON = 1e-12

#: Of the weights and of the polynomials, by the kind of normalizer. Polynomials train relative to what calibration made
#: of them (`patching.relative`). With l1 that is nearly softmax already, and what is left to learn is less.
LEARNING_RATES = {"fixed": (1e-4, 2e-3), "l1": (1e-5, 2e-3)}


def distill(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    layer_steps: int = 0,
    lr: float | None = None,
    coefficient_lr: float | None = None,
    weight_decay: float = 0.0,
    teacher: nn.Module | None = None,
    max_grad_norm: float = 1.0,
    warmup: float = 0.1,
    until: float = 0.0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    accelerator: Any = None,
    progress: bool = True,
) -> TrainingReport:
    """Trains a patched model, in place, to match its softmax teacher's hidden states and logits.

    First, for `layer_steps` steps, layer by layer and only the polynomials without l1, see `match_layers`. Then end to
    end: AdamW with warm-up, then cosine decay to 0. Every parameter that requires a gradient trains, the
    polynomials too. Dropout stays off, as in the teacher; train or eval mode is restored.

    Args:
        model: patched, best calibrated. Under an accelerator it is prepared if it was not.
        batches: dicts of model inputs, gone through again when there are fewer than `steps`. Under an
            accelerator each process brings its own, for example from a loader that it prepared.
        steps: optimizer updates end to end, one batch each.
        layer_steps: updates of the layer-by-layer part before it.
        lr: peak learning rate of the model's weights; None takes `LEARNING_RATES` of the model's normalizers.
        coefficient_lr: the same for polynomials, centers and row shifts; None takes those of `LEARNING_RATES`, or
            `lr` if that is given.
        weight_decay: of the matrices; polynomials, norms and biases have none.
        teacher: a softmax model with the same layers. None takes a copy of `model` with softmax restored:
            right as long as its weights are still the pretrained ones.
        max_grad_norm: gradients are clipped to this norm.
        warmup: fraction of the steps over which the learning rate rises.
        until: stop as soon as the mean loss of the last ten steps is no larger.
        checkpoint: file that keeps the state of the training; if it exists the training goes on from there, and it is
            removed at the end. With the same batches in the same order the result is that of an unbroken training.
        checkpoint_every: steps between two states.
        accelerator: an `accelerate.Accelerator`, for several processes and mixed precision.
        progress: show a progress bar.

    Returns:
        The loss and gradient norm of every step.

    Raises:
        PatchError: the model is not patched, or the teacher is.
        InputError: no steps, no batches, models whose outputs cannot be compared, or a checkpoint of another
            training.
        TrainingError: a loss or gradient is not finite; the model keeps the last weights whose loss was.
    """
    options = TrainingOptions(
        steps=steps,
        warmup=warmup,
        max_grad_norm=max_grad_norm,
        until=until,
        checkpoint_every=checkpoint_every,
        accelerator=accelerator,
        progress=progress,
    )
    check_training(model, batches, teacher, options, role="student")
    defaults = LEARNING_RATES["l1" if _has_row_sums(model) else "fixed"]
    if coefficient_lr is None:
        coefficient_lr = defaults[1] if lr is None else lr
    lr = defaults[0] if lr is None else lr
    settings = {"spec": spec_of(model), "steps": steps, "layer_steps": layer_steps, "lr": lr}
    state = TrainingState(checkpoint, {**settings, "coefficient_lr": coefficient_lr, "weight_decay": weight_decay})
    with teaching(model, teacher, accelerator) as softmax:
        if layer_steps and state.saved is None and any(matchable(child) for _, child in patched_layers(model)):
            match_layers(model, batches, steps=layer_steps, progress=progress)
        groups = param_groups(model, lr, coefficient_lr=coefficient_lr, weight_decay=weight_decay)
        return train(model, batches, partial(divergence_from, softmax), groups, options, state=state, title="distil")


def divergence_from(teacher: nn.Module, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Returns the loss of a batch under a model, compared with its teacher."""
    with torch.no_grad():
        target = teacher(**inputs, output_hidden_states=True, return_dict=True)
    return divergence(model(**inputs, output_hidden_states=True, return_dict=True), target, inputs)


def _has_row_sums(model: nn.Module) -> bool:
    return any(child.config.spec.normalizer == "l1" for _, child in patched_layers(model))


def divergence(output: Any, target: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Returns how far a student's outputs are from its teacher's: the loss of `distill`, a float32 scalar.

    The relative squared error of the hidden states, mean over layers, plus the Kullback-Leibler divergence of
    the logits, mean over positions; 0 for equal outputs. Padding, by `attention_mask`, is left out, and that of a
    decoder by `decoder_attention_mask` or its labels.

    Args:
        output: the student's, a `ModelOutput` with the same fields as the teacher's.
        target: the teacher's; what it calls `…hidden_states` and `…logits` is compared.
        inputs: of both models.

    Raises:
        InputError: the teacher's outputs have neither.
    """
    terms = []
    in_decoder = any(name.startswith("decoder") for name in target)
    for name, expected in target.items():
        visible = real_positions(inputs, decoder=in_decoder and not name.startswith("encoder"))
        if name.endswith("hidden_states"):
            errors = [_relative_error(*pair, visible) for pair in zip(output[name], expected, strict=True)]
            terms.append(torch.stack(errors).mean())
        elif name.endswith("logits"):
            compare = _relative_error if expected.shape[-1] == 1 else _kullback_leibler
            terms.append(compare(output[name], expected, visible))
    if not terms:
        raise InputError(f"the model's outputs {list(target)} have neither hidden states nor logits to match")
    return torch.stack(terms).sum()


def _relative_error(student: Tensor, teacher: Tensor, visible: Tensor | None) -> Tensor:
    student, teacher = rows_of(student, visible), rows_of(teacher, visible)
    return (student - teacher).square().sum() / ((teacher - teacher.mean(0)).square().sum() + _EPSILON)


def _kullback_leibler(student: Tensor, teacher: Tensor, visible: Tensor | None) -> Tensor:
    student, teacher = rows_of(student, visible).log_softmax(-1), rows_of(teacher, visible).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)
