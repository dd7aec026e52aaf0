"""Partition alignment: a short training under softmax after which a polynomial can do without the division.

Softmax divides row i by exp(lse_i). A polynomial with a fixed normalizer cannot, and has only its center to follow
lse_i: c⁰ + scaling · q_i·μ, linear in the query. What is linear costs nothing, so what counts is the rest,

    residual_i = lse_i − α log n_i − (its regression on q_i and a constant),

with α = ½ for rsqrt, 1 for mean, 0 for none. Alignment trains the softmax model with its mean square as a penalty,
beside the distillation loss that keeps the model where it was. Source: DESIGN.md, "Partition alignment".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops.moments import moments_of
from ..patching.core import PolyAttention
from ..patching.patched import patched_layers, spec_of
from ..patching.row_shift import alpha_of, features
from ..spec import PolyAttentionConfig
from .capture import Observation, observing
from .distillation import divergence_from
from .fitting.solves import solve
from .teacher import check_training, teaching
from .training import TrainingOptions, TrainingReport, TrainingState, param_groups, train

MAX_ROWS = 128  # query rows of a batch entry whose partition sums are looked at


def align(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    penalty: float = 0.3,
    lr: float = 3e-4,
    weight_decay: float = 0.0,
    teacher: nn.Module | None = None,
    max_grad_norm: float = 1.0,
    warmup: float = 0.1,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    accelerator: Any = None,
    progress: bool = True,
) -> TrainingReport:
    """Trains the weights of a patched model under softmax, in place, so that its rows' partition sums agree.

    The polynomials are not used and do not change; calibrate afterwards.

    Args:
        model: patched with the spec that is to come.
        batches: dicts of model inputs, gone through again when there are fewer than `steps`.
        steps: optimizer updates, one batch each.
        penalty: weight of the mean squared residual, nats², beside the distillation loss.
        lr: peak learning rate.
        weight_decay: of the matrices.
        teacher: the softmax model to stay close to; None takes a copy of `model` with softmax restored.
        max_grad_norm, warmup, checkpoint, checkpoint_every, accelerator, progress: see `distill`.

    Returns:
        The loss and gradient norm of every step.

    Raises:
        PatchError: the model is not patched, or the teacher is.
        InputError: no steps, no batches, or a spec with l1, which divides by the partition sum itself.
        TrainingError: a loss or gradient is not finite.
    """
    options = TrainingOptions(
        steps=steps,
        warmup=warmup,
        max_grad_norm=max_grad_norm,
        until=0.0,
        checkpoint_every=checkpoint_every,
        accelerator=accelerator,
        progress=progress,
    )
    check_training(model, batches, teacher, options, role="model")
    layers = patched_layers(model)
    if all(child.config.spec.normalizer == "l1" for _, child in layers):
        raise InputError(
            f"{spec_of(model)} divides by its row sums and needs no alignment; it is for rsqrt, mean, none"
        )
    state = TrainingState(checkpoint, {"align": spec_of(model), "steps": steps, "lr": lr, "penalty": penalty})
    with teaching(model, teacher, accelerator) as softmax, _frozen(layers):
        groups = param_groups(model, lr, weight_decay=weight_decay)
        loss_of = partial(_loss, softmax, layers, penalty)
        return train(model, batches, loss_of, groups, options, state=state, title="align")


@contextmanager
def _frozen(layers: list[tuple[str, PolyAttention]]) -> Iterator[None]:
    """Within, no polynomial gets a gradient."""
    polynomials = [p for _, child in layers for p in child.parameters() if p.requires_grad]
    for parameter in polynomials:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in polynomials:
            parameter.requires_grad_(True)


def _loss(
    teacher: nn.Module,
    layers: list[tuple[str, PolyAttention]],
    penalty: float,
    model: nn.Module,
    inputs: Mapping[str, Any],
) -> Tensor:
    residuals: list[Tensor] = []

    def observer(path: str, child: PolyAttention, seen: Observation) -> None:
        if child.config.spec.normalizer != "l1":
            with torch.autocast(seen.query.device.type, enabled=False):  # a small difference of large numbers
                residuals.append(residual(seen, child.config))

    with ExitStack() as stack:
        for path, child in layers:
            stack.enter_context(observing(model, path, child, inputs, observer))
        divergence = divergence_from(teacher, model, inputs)
    return divergence + penalty * torch.stack(residuals).mean()


def residual(seen: Observation, config: PolyAttentionConfig) -> Tensor:
    """Returns the mean squared residual of a layer's log partition sums, nats², a differentiable float32 scalar.

    It is what the row shift of the config, with weights of this batch, would leave of them; moments where none is
    chosen yet, as `calibrate` will most likely.

    The regression is that of this batch, per head; its coefficients are held fixed, for they are optimal: the gradient
    is that of the minimum.
    """
    query, key = seen.query.float(), seen.key.float()
    length = query.shape[2]
    rows = range(0, length, max(1, -(-length // MAX_ROWS)))
    visible = seen.visible(rows).expand(query.shape[0], -1, -1, -1)
    query = query[:, :, :: rows.step]
    batch, heads, _, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, dim)
    scores = (grouped @ key.transpose(-1, -2)).reshape(batch, heads, len(rows), -1) * seen.scaling
    count = visible.sum(-1)
    weight = (count > 0).expand(batch, heads, -1)
    if seen.real is not None:
        weight = weight & seen.real[:, None, :: rows.step]
    # a row that sees nothing gets finite scores, and no weight
    lse = scores.masked_fill(~(visible | (count == 0).unsqueeze(-1)), -torch.inf).logsumexp(-1)
    count = count.clamp(min=1).float()
    y = lse - alpha_of(config.spec.normalizer) * count.log()
    query = query * seen.scaling
    x = torch.cat([query, torch.ones_like(query[..., :1])], -1)
    uncalibrated = config.row_shift == "none" and not config.interval
    if config.row_shift == "moments" or uncalibrated:
        found = features(query, *moments_of(scores, visible, count), count, None)
        x = torch.cat([x, count.log().unsqueeze(-1) * query, found], -1)
    x = x.transpose(0, 1).flatten(1, 2)
    y, weight = (tensor.transpose(0, 1).flatten(1) for tensor in (y, weight.float()))  # (H, rows)
    with torch.no_grad():
        weighted = (x * weight.unsqueeze(-1)).double()
        moment = (weighted.mT @ y.double().unsqueeze(-1)).squeeze(-1)
        solution = solve(weighted.mT @ x.double(), moment, ridge=1e-6).float()
    rest = y - (x @ solution.unsqueeze(-1)).squeeze(-1)
    mean_square: Tensor = (rest.square() * weight).sum() / weight.sum().clamp(min=1.0)
    return mean_square
