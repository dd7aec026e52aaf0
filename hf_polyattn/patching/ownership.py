"""Whose a patched config is: a model that governs polynomials by a config shares it with no other model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from weakref import WeakValueDictionary, finalize, ref

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# The outermost model that governs by a config, by the config's id.
_OWNERS: WeakValueDictionary[int, PreTrainedModel] = WeakValueDictionary()


# The config that a config was copied from, by the copy's id: a model around may still have it inside of its own.
_ORIGINALS: dict[int, ref[PreTrainedConfig]] = {}


def own_configs(model: nn.Module) -> None:
    """Gives a model copies of the configs that are not its own, in all of its modules and in a wrapper around it.

    Two models that were built from one config object would else become polynomial, and softmax again, together.

    Args:
        model: a `PreTrainedModel` or a wrapper around one.
    """
    parts = set(model.modules())
    # A part that has a copy already keeps it: the config that names the part has the original.
    memo = {id(original): config for original, config in _copied(model)}
    for module in parts:
        for name, config in _configs(module):
            owner = owner_of(config)
            if owner is None or (owner not in parts and model not in set(owner.modules())):
                vars(module)[name] = copied = copy.deepcopy(config, memo)
                _ORIGINALS[id(copied)] = ref(config)
                finalize(copied, _ORIGINALS.pop, id(copied), None)
    claim_configs(model)


def join_configs(model: nn.Module) -> None:
    """Puts the configs of parts that were patched by themselves into the config of the model around them."""
    copied = list(_copied(model))
    for module in model.modules():
        for _, config in _configs(module):
            for name, inner in vars(config).items():
                for original, copy_of_it in copied:
                    if inner is original:
                        vars(config)[name] = copy_of_it


def _copied(model: nn.Module) -> Iterator[tuple[PreTrainedConfig, PreTrainedConfig]]:
    """Yields (original, copy) for each config of the model that is a copy of one that is still there."""
    for module in model.modules():
        for _, config in _configs(module):
            original = _ORIGINALS[id(config)]() if id(config) in _ORIGINALS else None
            if original is not None:
                yield original, config


def claim_configs(model: nn.Module) -> None:
    """Makes a model, or the one inside of its wrapper, the owner of the configs in its modules."""
    root = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    for module in model.modules():
        for _, config in _configs(module):
            owner = owner_of(config)
            if owner is None or root not in set(owner.modules()):
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
