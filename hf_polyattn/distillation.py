"""Distillation: training a patched model, end to end, to answer as its softmax teacher does.

The loss compares what the two models compute on the same batch, padding left out:

    loss = mean over layers of ‖h_student − h_teacher‖² / ‖h_teacher − mean h_teacher‖²  +  KL(teacher ‖ student)

over the hidden states of every layer and, where the model has a head, over its logits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .core import PolyAttention
from .errors import InputError, PatchError, PolyAttnError
from .patch import is_patched, pretrained_model, unpatch_model

_EPSILON = 1e-12


class DistillationError(PolyAttnError):
    """A training that went wrong: the loss or its gradient is not a finite number."""


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What happened to the loss.

    Attributes:
        losses: of each step, before its update; 0 is a student that equals its teacher, and a hidden state
            that carries nothing of the teacher's adds 1 or more.
        gradient_norms: of each step, before clipping.
    """

    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        tenth = max(1, len(self.losses) // 10)
        first, last = (sum(part) / tenth for part in (self.losses[:tenth], self.losses[-tenth:]))
        return f"distilled for {len(self.losses)} steps: loss {first:.4g} at first, {last:.4g} at last"


def distill(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    lr: float = 3e-4,
    coefficient_lr: float | None = None,
    weight_decay: float = 0.0,
    teacher: nn.Module | None = None,
    max_grad_norm: float = 1.0,
    warmup: float = 0.1,
    accelerator: Any = None,
    progress: bool = True,
) -> DistillReport:
    """Trains a patched model, in place, to match its softmax teacher's hidden states and logits.

    AdamW with warm-up, then cosine decay to 0. Every parameter that requires a gradient trains, the
    polynomials too. Dropout stays off, as in the teacher; train or eval mode is restored.

    Args:
        model: patched, best calibrated. Under an accelerator it is prepared if it was not.
        batches: dicts of model inputs, gone through again when there are fewer than `steps`. Under an
            accelerator each process brings its own, for example from a loader that it prepared.
        steps: optimizer updates, one batch each.
        lr: peak learning rate.
        coefficient_lr: the same for coefficients, centers and key shifts; `lr` if None.
        weight_decay: of the matrices; polynomials, norms and biases have none.
        teacher: a softmax model with the same layers. None takes a copy of `model` with softmax restored:
            right as long as its weights are still the pretrained ones.
        max_grad_norm: gradients are clipped to this norm.
        warmup: fraction of the steps over which the learning rate rises.
        accelerator: an `accelerate.Accelerator`, for several processes and mixed precision.
        progress: show a progress bar.

    Returns:
        The loss and gradient norm of every step.

    Raises:
        PatchError: the model is not patched, or the teacher is.
        InputError: no steps, no batches, or models whose outputs cannot be compared.
        DistillationError: a loss or gradient is not finite; the model keeps the last weights whose loss was.
    """
    if not is_patched(model):
        raise PatchError(f"{type(model).__name__} is not patched; call patch_model(model, spec) first")
    if teacher is not None and is_patched(teacher):
        raise PatchError("the teacher is patched; give the softmax model, or None for a softmax copy of the student")
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if accelerator is not None and accelerator.gradient_accumulation_steps != 1:
        raise InputError("distill takes one batch an update; use an Accelerator with gradient_accumulation_steps=1")
    if teacher is None:
        teacher = unpatch_model(copy.deepcopy(pretrained_model(model)))

    groups = param_groups(model, lr, coefficient_lr=coefficient_lr, weight_decay=weight_decay)
    optimizer: Any = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, steps, warmup))
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    device = next(model.parameters()).device
    teacher.to(device)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    good = [parameter.detach().clone() for parameter in trained]
    losses: list[float] = []
    norms: list[float] = []

    bar = tqdm(islice(_cycle(batches), steps), total=steps, desc="distil", unit="step", disable=not progress)
    with bar, _evaluating(model), _evaluating(teacher), ExitStack() as precision:
        if accelerator is not None:
            precision.enter_context(accelerator.autocast())
        for batch in bar:
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            with torch.no_grad():
                target = teacher(**inputs, output_hidden_states=True, return_dict=True)
            output = model(**inputs, output_hidden_states=True, return_dict=True)
            loss = _divergence(output, target, inputs)
            if accelerator is None:
                loss.backward()  # type: ignore[no-untyped-call]
                norm = nn.utils.clip_grad_norm_(trained, max_grad_norm)
                mean_loss = loss.detach()
            else:
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(trained, max_grad_norm)
                mean_loss = accelerator.reduce(loss.detach(), "mean")
            losses.append(float(mean_loss))
            norms.append(float(norm))
            if not math.isfinite(losses[-1] + norms[-1]):
                _copy(good, trained)
                optimizer.zero_grad()
                raise DistillationError(
                    f"step {len(losses)}: the loss is {losses[-1]} and its gradient's norm {norms[-1]}. The model "
                    f"keeps its last good weights. Calibrate before distilling, or lower lr (now {lr:g})."
                )
            _copy(trained, good)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{losses[-1]:.4g}", refresh=False)
    return DistillReport(tuple(losses), tuple(norms))


def param_groups(
    model: nn.Module, lr: float, *, coefficient_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Returns optimizer groups of the parameters that require a gradient.

    The polynomials (coefficients, centers and key shifts) have their own learning rate and no weight decay: a
    decayed coefficient is another polynomial. Norms and biases have none either.

    Args:
        model: patched or not.
        lr: learning rate of the model's own weights.
        coefficient_lr: learning rate of the polynomials; `lr` if None.
        weight_decay: of the model's matrices.

    >>> from hf_polyattn import PolyAttentionConfig
    >>> layer = PolyAttention(PolyAttentionConfig("poly3"), heads=4, head_dim=8)
    >>> [(group["lr"], len(group["params"])) for group in param_groups(layer, 1e-4, coefficient_lr=1e-3)]
    [(0.001, 1)]
    """
    polynomial = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, PolyAttention)
        for parameter in module.parameters()
    }
    groups: dict[str, list[nn.Parameter]] = {"polynomial": [], "matrix": [], "vector": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "polynomial" if id(parameter) in polynomial else "matrix" if parameter.ndim > 1 else "vector"
            groups[kind].append(parameter)
    settings = {
        "polynomial": {"lr": lr if coefficient_lr is None else coefficient_lr, "weight_decay": 0.0},
        "matrix": {"lr": lr, "weight_decay": weight_decay},
        "vector": {"lr": lr, "weight_decay": 0.0},
    }
    return [{"params": params, **settings[kind]} for kind, params in groups.items() if params]


def _divergence(output: Any, target: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Returns the loss of the module's docstring, a float32 scalar.

    Hidden states and logits are what the outputs call `…hidden_states` and `…logits`.
    """
    terms = []
    for name, expected in target.items():
        visible = inputs.get("decoder_attention_mask" if name.startswith("decoder") else "attention_mask")
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
    student, teacher = _rows(student, visible), _rows(teacher, visible)
    return (student - teacher).square().sum() / ((teacher - teacher.mean(0)).square().sum() + _EPSILON)


def _kullback_leibler(student: Tensor, teacher: Tensor, visible: Tensor | None) -> Tensor:
    student, teacher = _rows(student, visible).log_softmax(-1), _rows(teacher, visible).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _rows(states: Tensor, visible: Tensor | None) -> Tensor:
    """Returns the states of all positions that are not padding, float32 (positions, features)."""
    if visible is not None and visible.shape == states.shape[:-1]:
        states = states[visible.bool()]
    return states.flatten(0, -2).float()


def _learning_rate(step: int, steps: int, warmup: float) -> float:
    """Returns the learning rate of an update, counted from 0, relative to its peak."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, steps - rise))


def _cycle(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yields batches without end; a loader that shuffles does so each time."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise InputError("batches is empty or used up; give a list or a DataLoader")


def _copy(sources: list[Tensor], destinations: list[Tensor]) -> None:
    with torch.no_grad():
        for source, destination in zip(sources, destinations, strict=True):
            destination.copy_(source)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode and its modules back in the mode that each had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
