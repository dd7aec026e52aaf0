"""Layer-by-layer matching: every polynomial, alone, learns to give softmax's output for softmax's inputs.

Softmax runs, so that no layer sees another's errors and no second copy of the model is in memory. Only the polynomials
(their changes, centers and key shifts) train. It goes on where calibration in closed form ends, which takes centers and
key shifts from a regression and the widths from a list. That helps polynomials with a fixed normalizer; those over
their row sum (l1) are left as calibration made them, for gradient steps made models with them worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import InputError
from ..patching.core import PolyAttention
from ..patching.patched import patched_layers, spec_of
from ..patching.running import require_polynomial
from .capture import Observation, observe, take_batches
from .progress import hidden

_EPSILON = 1e-12


def match_layers(
    model: nn.Module, batches: Iterable[Any], *, steps: int, lr: float = 2e-2, progress: bool = True
) -> tuple[float, ...]:
    """Trains the polynomials of a patched model, in place and each by itself, to reproduce softmax's outputs.

    Adam, gradients clipped to norm 1, cosine decay to 0. The loss of a layer is ‖out − softmax‖² / ‖softmax − its
    mean‖² over the positions that are not padding. Under `torch.distributed` the processes average their gradients.

    Args:
        model: patched and calibrated; layers with l1 keep their polynomials.
        batches: model inputs, see `calibrate`; gone through again when there are fewer than `steps`.
        steps: updates, one batch each.
        lr: peak learning rate.
        progress: show a progress bar.

    Returns:
        The loss of every step, the mean of the layers', before its update.

    Raises:
        PatchError: the model is not patched, or is not running its polynomials.
        InputError: no steps, no batches, or no polynomial that could train: all of them frozen, or with l1.
    """
    require_polynomial(model)
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    layers = [child for _, child in patched_layers(model) if matchable(child)]
    trained = [p for child in layers for p in child.parameters() if p.requires_grad]
    if not trained:
        raise InputError(
            f"{spec_of(model)}: no polynomial can be matched, for all are frozen (learnable=False) or divide by their "
            "row sums (l1), which calibration has fitted already"
        )
    optimizer = torch.optim.Adam(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 + 0.5 * math.cos(math.pi * s / steps))
    taken = take_batches(batches, steps)
    losses = []
    bar = tqdm(range(steps), desc="match layers", unit="step", disable=hidden(progress))
    for step in bar:
        terms: list[float] = []

        def observer(path: str, child: PolyAttention, seen: Observation, terms: list[float] = terms) -> None:
            if child not in layers:
                return
            with torch.enable_grad():
                loss = _error(child, seen)
                loss.backward()  # type: ignore[no-untyped-call]
            terms.append(float(loss.detach()))

        observe(model, [taken[step % len(taken)]], observer, progress=False)
        _average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(sum(terms) / len(terms))
        bar.set_postfix(loss=f"{losses[-1]:.4g}", refresh=False)
    return tuple(losses)


def matchable(child: PolyAttention) -> bool:
    """Whether `match_layers` trains a polynomial: not if it is frozen or divides by its row sum."""
    return child.config.learnable and child.config.spec.normalizer != "l1"


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def _error(child: PolyAttention, seen: Observation) -> Tensor:
    output = child(seen.query, seen.key, seen.value, **seen.pattern)
    real = torch.ones(output.shape[:2], dtype=torch.bool, device=output.device) if seen.real is None else seen.real
    ours, softmax = output[real].float(), seen.output[real].float()
    error: Tensor = (ours - softmax).square().sum() / ((softmax - softmax.mean(0)).square().sum() + _EPSILON)
    return error
