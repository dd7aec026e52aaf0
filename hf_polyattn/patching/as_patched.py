"""Whether a model's own weights are still those that it had when it was patched: softmax of them is the teacher then.

A few numbers of every weight are remembered. One that is another now is sure to have changed; where none is, a training
that reached few numbers only, or none of these modules, may have been missed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .core import CHILD_NAME

_NOTE = "_polyattn_weights_as_patched"
SAMPLES = 8  # of each weight


@dataclass(slots=True)
class _Note:
    """What a model remembers of its weights; it is copied and pickled with the model.

    Attributes:
        samples: by path and shape of the weight.
        said: whether somebody was warned that they changed.
    """

    samples: dict[tuple[str, torch.Size], Tensor]
    said: bool = False


def note_weights(root: nn.Module) -> None:
    """Remembers the weights of a model that is being patched, or that is about to be trained; an earlier note stays."""
    if _noted(root) is None:
        setattr(root, _NOTE, _Note(dict(_samples(root))))


def forget_weights(root: nn.Module) -> None:
    """Forgets what was noted: the model is softmax again."""
    for module in root.modules():
        vars(module).pop(_NOTE, None)


def weights_changed(root: nn.Module) -> bool | None:
    """Returns whether weights are sure to have changed since they were noted; None if they never were."""
    module = _noted(root)
    if module is None:
        return None
    then = vars(module)[_NOTE].samples
    return any(
        key in then and then[key].dtype == now.dtype and not torch.equal(then[key], now)
        for key, now in _samples(module)
    )


def warn_of_change(root: nn.Module, stacklevel: int) -> None:
    """Warns, once, where softmax of a model's weights is not the model that was patched."""
    module = _noted(root)
    if module is None or vars(module)[_NOTE].said or not weights_changed(root):
        return
    vars(module)[_NOTE].said = True
    warnings.warn(
        f"the weights of this {type(root).__name__} have changed since it was patched: it is compared with softmax of "
        "the weights that it has now, not with the model that it was. Pass teacher=, the softmax model.",
        stacklevel=stacklevel + 1,
    )


def _noted(root: nn.Module) -> nn.Module | None:
    """Returns the part of a model that has a note: the model itself, or one inside that was patched by itself."""
    return next((module for module in root.modules() if _NOTE in vars(module)), None)


@torch.no_grad()
def _samples(root: nn.Module) -> Iterator[tuple[tuple[str, torch.Size], Tensor]]:
    """Yields path and shape and a few numbers, on the CPU, of each weight that is whole and not of a polynomial."""
    found: dict[tuple[str, torch.Size], Tensor] = {}
    for name, parameter in root.named_parameters():
        whole: Any = type(parameter) is nn.Parameter and not parameter.is_meta and parameter.numel() > 0
        if whole and parameter.is_floating_point() and CHILD_NAME not in name.split("."):
            step = -(-parameter.numel() // SAMPLES)
            found[name, parameter.shape] = parameter.detach().reshape(-1)[::step]
    by_kind: dict[Any, list[tuple[str, torch.Size]]] = {}
    for key, sample in found.items():
        by_kind.setdefault((sample.device, sample.dtype), []).append(key)
    for keys in by_kind.values():  # a device is waited for once
        together, start = torch.cat([found[key] for key in keys]).cpu(), 0
        for key in keys:
            yield key, together[start : start + found[key].numel()].clone()
            start += found[key].numel()
