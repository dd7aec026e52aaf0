"""The loop in which `distill` and `align` train a model: AdamW, warm-up, cosine decay, a state on disk to resume from.

Recipes that train on labels use the `Trainer` of Transformers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import InputError, TrainingError
from ..files import written_beside
from ..patching.core import PolyAttention
from .batches import require_inputs
from .progress import hidden

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]
_RECENT = 10  # steps over which `until` takes the mean


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What happened to the loss.

    Attributes:
        losses: of each step, before its update.
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
        return f"trained for {len(self.losses)} steps: loss {first:.4g} at first, {last:.4g} at last"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """How long and how `train` trains: what `distill` and `align` are given alike.

    Attributes:
        steps: optimizer updates, one batch each.
        warmup: fraction of the steps over which the learning rate rises.
        max_grad_norm: gradients are clipped to this norm.
        until: stop when the mean loss of the last ten steps is no larger.
        checkpoint_every: steps between two states.
        accelerator: an `accelerate.Accelerator` or None.
        progress: show a progress bar.
    """

    steps: int
    warmup: float
    max_grad_norm: float
    until: float
    checkpoint_every: int
    accelerator: Any
    progress: bool


def train(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    loss_of: Loss,
    groups: list[dict[str, Any]],
    options: TrainingOptions,
    *,
    state: TrainingState,
    title: str,
) -> TrainingReport:
    """Trains a model in place; dropout is off, and train or eval mode is restored.

    Args:
        model: what trains; under an accelerator it is prepared if it was not.
        batches: dicts of model inputs, gone through again when there are fewer than `steps`.
        loss_of: returns the loss of (the model, a batch on its device), a float32 scalar.
        groups: of the optimizer, see `param_groups`.
        options: how long and how.
        state: where the training goes on from and is kept; removed at the end.
        title: of the progress bar.

    Raises:
        InputError: no batches, or one that is no mapping.
        TrainingError: a loss or gradient is not finite; the model keeps the last weights whose loss was.
    """
    accelerator, steps = options.accelerator, options.steps
    optimizer: Any = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, steps, options.warmup))
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    device = next(model.parameters()).device
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses: list[float] = []
    norms: list[float] = []
    if state.saved is not None:
        _copy([tensor.to(device) for tensor in state.saved["weights"]], trained)
        optimizer.load_state_dict(state.saved["optimizer"])
        schedule.load_state_dict(state.saved["schedule"])
        losses, norms = [*state.saved["losses"]], [*state.saved["norms"]]
    good = [parameter.detach().clone() for parameter in trained]

    remaining = islice(_cycle(batches), len(losses), steps)
    bar = tqdm(remaining, total=steps, initial=len(losses), desc=title, unit="step", disable=hidden(options.progress))
    with bar, evaluating(model):
        for batch in bar:
            require_inputs(batch)
            inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            with nullcontext() if accelerator is None else accelerator.autocast():
                loss = loss_of(model, inputs)
            if accelerator is None:
                loss.backward()  # type: ignore[no-untyped-call]
                norm = nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
                mean_loss = loss.detach()
            else:
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(trained, options.max_grad_norm)
                mean_loss = accelerator.reduce(loss.detach(), "mean")
            losses.append(float(mean_loss))
            norms.append(float(norm))
            if not math.isfinite(losses[-1] + norms[-1]):
                _copy(good, trained)
                optimizer.zero_grad()
                rates = max(group["initial_lr"] for group in groups)
                raise TrainingError(
                    f"{title}, step {len(losses)}: the loss is {losses[-1]} and its gradient's norm {norms[-1]}. The "
                    f"model keeps its last good weights. Calibrate before training, or lower lr (now up to {rates:g})."
                )
            _copy(trained, good)
            optimizer.step()
            torch.clear_autocast_cache()  # within an autocast of the caller's, it holds casts of the weights before
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{losses[-1]:.4g}", refresh=False)
            if len(losses) >= _RECENT and sum(losses[-_RECENT:]) <= options.until * _RECENT:
                break
            if len(losses) % options.checkpoint_every == 0 and (accelerator is None or accelerator.is_main_process):
                state.save(
                    weights=[parameter.detach() for parameter in trained],
                    optimizer=optimizer.state_dict(),
                    schedule=schedule.state_dict(),
                    losses=losses,
                    norms=norms,
                )
    state.remove()
    return TrainingReport(tuple(losses), tuple(norms))


class TrainingState:
    """What a training needs to go on where it was cut off.

    Args:
        path: the file; None keeps nothing.
        settings: JSON types that make the training what it is; those of another training are refused.

    Raises:
        InputError: the file cannot be read, or is of a training with other settings.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings = dict(settings)
        self.saved: dict[str, Any] | None = None
        if self.path is None or not self.path.exists():
            return
        try:
            self.saved = torch.load(self.path, map_location="cpu", weights_only=True)
            theirs = self.saved["settings"]
        except Exception as error:  # whatever a broken file makes torch raise
            raise InputError(
                f"{self.path} is not the state of a training ({error}); remove it to begin anew"
            ) from error
        changed = {k: (theirs.get(k), v) for k, v in self.settings.items() if theirs.get(k) != v}
        if changed:
            listed = ", ".join(f"{name} was {old!r} and is now {now!r}" for name, (old, now) in changed.items())
            raise InputError(f"{self.path} is of another training: {listed}. Remove it to begin anew.")

    def save(self, **state: Any) -> None:
        """Writes the state beside the file and renames it: the file is whole at any moment."""
        if self.path is None:
            return
        with written_beside(self.path) as partial:
            torch.save({"settings": self.settings, **state}, partial)

    def remove(self) -> None:
        """Removes the file, if there is one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def param_groups(
    model: nn.Module, lr: float, *, coefficient_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Returns optimizer groups of the parameters that require a gradient.

    The polynomials (their changes, centers and row shifts) have their own learning rate and no weight decay: a decayed
    center is another interval. Norms and biases have none either.

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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode and its modules back in the mode that each had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def rows_of(states: Tensor, visible: Tensor | None) -> Tensor:
    """Returns the states of all positions that are not padding, float32 (positions, features)."""
    if visible is not None and visible.shape == states.shape[:-1]:
        states = states[visible.bool()]
    return states.flatten(0, -2).float()
