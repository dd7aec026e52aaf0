"""Whose a patched config is: a model that governs polynomials by a config shares it with no other model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from weakref import WeakValueDictionary

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# The outermost model that governs by a config, by the config's id.
_OWNERS: WeakValueDictionary[int, PreTrainedModel] = WeakValueDictionary()


def own_configs(model: nn.Module) -> None:
    """Gives a model copies of the configs that are not its own, in all of its modules and in a wrapper around it.

    Two models that were built from one config object would else become polynomial, and softmax again, together.

    Args:
        model: a `PreTrainedModel` or a wrapper around one.
    """
    parts = set(model.modules())
    memo: dict[int, object] = {}
    for module in parts:
        for name, config in _configs(module):
            if owner_of(config) not in parts:
                vars(module)[name] = copy.deepcopy(config, memo)
    claim_configs(model)


def claim_configs(model: nn.Module) -> None:
    """Makes a model, or the one inside of its wrapper, the owner of the configs in its modules."""
    root = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    for module in model.modules():
        for _, config in _configs(module):
            _OWNERS[id(config)] = root


def owner_of(config: PreTrainedConfig) -> PreTrainedModel | None:
    """Returns the model that owns a config, None if it is nobody's."""
    owner = _OWNERS.get(id(config))
    if owner is None or not any(held is config for part in owner.modules() for _, held in _configs(part)):
        return None  # an id that was used before
    return owner


def is_part_of_a_build(model: PreTrainedModel) -> bool:
    """Whether the `__init__` of another model, which this one will be a part of, is still running.

    Only the call stack knows: a submodel is complete, and armed, long before the model around it holds it.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            built = frame.f_locals.get("self")
            if isinstance(built, PreTrainedModel) and built is not model:
                return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _configs(module: nn.Module) -> Iterator[tuple[str, PreTrainedConfig]]:
    yield from [(name, value) for name, value in vars(module).items() if isinstance(value, PreTrainedConfig)]
