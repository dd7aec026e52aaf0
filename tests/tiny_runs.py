"""Runs of tiny models: what a model returns, how far two runs are apart, and what a run leaves behind."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tiny_models import Inputs
from torch import Tensor, nn
from transformers import PreTrainedModel

Outputs = dict[str, Tensor]


def with_and_without_mask(model: PreTrainedModel, inputs: Inputs) -> list[Inputs]:
    """Returns the inputs, and the inputs without their attention mask if the model can do without."""
    unmasked = {name: value for name, value in inputs.items() if name != "attention_mask"}
    if unmasked.keys() == inputs.keys():
        return [inputs]
    try:
        run(model, unmasked)
    except Exception:
        return [inputs]
    return [inputs, unmasked]


@torch.no_grad()
def run(model: PreTrainedModel, inputs: Inputs) -> Outputs:
    """Returns the float tensors that a model returns, by name."""
    torch.manual_seed(0)
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return dict(tensors(model(**inputs, **cache)))


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, f"{name}.{key}")


def difference(outputs: Outputs, expected: Outputs) -> float:
    """Returns the largest difference, relative to the largest value of its tensor; inf where shapes differ."""
    if {name: value.shape for name, value in outputs.items()} != {name: v.shape for name, v in expected.items()}:
        return math.inf
    largest = 0.0
    for name, value in expected.items():
        finite = value.isfinite()
        if not torch.equal(finite, outputs[name].isfinite()):
            return math.inf
        if finite.any():
            scale = value[finite].abs().max().clamp(min=1e-30)
            largest = max(largest, ((outputs[name] - value)[finite].abs().max() / scale).item())
    return largest


def trace(model: PreTrainedModel, inputs: Inputs) -> tuple[Any, ...]:
    """Returns all that a patch could change and `unpatch_model` must restore: config, weights' names, outputs."""
    outputs = {name: value.numpy().tobytes() for name, value in run(model, inputs).items()}
    return model.config.to_json_string(), list(model.state_dict()), outputs


def name_of(module: nn.Module) -> str:
    return type(module).__name__


def class_names(modules: Iterable[nn.Module]) -> tuple[str, ...]:
    return tuple(sorted({name_of(module) for module in modules}))
