"""Guards on a model once its checkpoint is loaded: it has every polynomial that its config names, and no other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, PatchError
from ..patching import settings
from ..patching.core import CHILD_NAME, PolyAttention, is_patched
from ..patching.governing import SAVED_MODULES, SAVED_VERSION
from ..patching.relative import CHANGES, no_change
from ..patching.resuming import mark_untrained
from ..patching.saved_config import CONFIG_KEY, IMPLEMENTATIONS
from .checkpoint import AGAIN, check_tensors, polynomial_paths


def check_polynomials(model: nn.Module, source: str) -> None:
    """Checks the polynomials that a model has, after an adapter brought its own.

    Raises:
        CheckpointError: a tensor of theirs that is not finite, or a radius that is not positive.
    """
    for path, module in model.named_modules():
        if isinstance(module, PolyAttention):
            place = path.partition(f".{CHILD_NAME}")[0]
            named = ((f"{place}.{CHILD_NAME}.{name}", tensor) for name, tensor in module.state_dict().items())
            check_tensors(source, ((name, tensor) for name, tensor in named if not tensor.is_meta))


def check_loaded(model: nn.Module, info: Any, source: str) -> None:
    """Checks that a model got every polynomial that its config names, and no other, from its checkpoint.

    A config written by hand beside a softmax checkpoint names no modules: all of its polynomials may be missing, and
    those are marked for Transformers to initialize.

    Args:
        model: loaded, its missing tensors not yet set.
        info: `LoadStateDictInfo` of Transformers: missing, unexpected and mismatched keys.
        source: folder or Hub id of the checkpoint, named by errors.

    Raises:
        CheckpointError: a polynomial's tensors are missing or have another shape, or the config names modules that
            neither the model nor the checkpoint has.
        PatchError: the model would be softmax where the checkpoint, or its attention implementation, is polynomial.
    """
    _refuse_softmax(model, info.unexpected_keys, source)
    polynomials = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PolyAttention)
    }
    _refuse_shapes(polynomials, info.mismatched_keys, source)
    missing: dict[str, set[str]] = defaultdict(set)
    for key in info.missing_keys:
        path, name = _owner(key, polynomials)
        if path is not None:
            missing[path].add(name)
    for path, names in [*missing.items()]:
        given = _restore_earlier(model, polynomials[path], names, f"{source}: the polynomial {path!r}")
        info.missing_keys.difference_update(f"{path}.{name}" for name in given)
        missing[path] = names - given
    _mark_missing(model, polynomials, {path: names for path, names in missing.items() if names}, source)
    for path, layer in polynomials.items():
        _take_settings(layer, f"{source}: {path}.{settings.NAME}", f"{path}.{settings.NAME}" in info.missing_keys)
    _refuse_absent(model, info.unexpected_keys, source)
    _refuse_implementation(model, source)


def _owner(key: str, polynomials: Mapping[str, PolyAttention]) -> tuple[str | None, str]:
    """Returns the path of the polynomial that a state dict key belongs to, None if none, and the name below it."""
    path, name = key, ""
    while path:
        path, _, last = path.rpartition(".")
        name = f"{last}.{name}" if name else last
        if path in polynomials:
            return path, name
    return None, key


def _restore_earlier(model: Any, layer: PolyAttention, missing: set[str], source: str) -> set[str]:
    """Gives a polynomial what earlier versions did not save of it; returns the tensors' names."""
    given = _set_no_change(layer, missing, source)
    if missing - given == {settings.NAME} and _saved_as_version_1(model):  # which had no settings
        layer.settings = settings.encoded(layer.config, layer.place)
        given = missing
    return given


def _saved_as_version_1(model: Any) -> bool:
    return any(getattr(module, SAVED_VERSION, None) == 1 for module in model.modules())


def _mark_missing(
    model: Any, polynomials: Mapping[str, PolyAttention], missing: Mapping[str, set[str]], source: str
) -> None:
    """Has Transformers initialize the polynomials that a checkpoint lacks, and no others.

    Raises:
        CheckpointError: the checkpoint was saved with them, or a part of one is missing.
    """
    for layer in polynomials.values():
        layer._is_hf_initialized = True
    saved = any(getattr(module, SAVED_MODULES, None) is not None for module in model.modules())
    for path, names in sorted(missing.items()):
        if saved or len(names) < len(polynomials[path].state_dict()):
            raise CheckpointError(
                f"{source}: {sorted(names)} of the polynomial {path!r} are missing, which config.json says is there. "
                f"{AGAIN} For a softmax checkpoint with a config written by hand, leave 'modules' out of {CONFIG_KEY}."
            )
        polynomials[path]._is_hf_initialized = False


def _set_no_change(layer: PolyAttention, missing: set[str], source: str) -> set[str]:
    """Gives a polynomial that an earlier version saved the change of none that it lacks; returns the tensors' names.

    Raises:
        CheckpointError: the polynomial itself is offloaded, so that nobody knows what it is.
    """
    changes = {name for name in layer.state_dict() if name.rpartition(".")[2] in CHANGES}
    if not changes <= missing or "coefficients" in missing:
        return set()
    if layer.place is None:
        raise CheckpointError(
            f"{source} was saved by an earlier version and cannot be offloaded to disk. Load "
            "the checkpoint into memory, and save it again with save_pretrained."
        )
    found = no_change({name: t for name, t in layer.state_dict().items() if name not in missing}, layer.config)
    for name, tensor in found.items():
        part, _, last = name.rpartition(".")
        parameter = nn.Parameter(tensor, requires_grad=layer.get_parameter(name).requires_grad)
        setattr(layer.get_submodule(part), last, parameter)
    mark_untrained(layer.delta)
    return {*found}


def _take_settings(layer: PolyAttention, source: str, missing: bool) -> None:
    """Gives a loaded polynomial the settings that were loaded with it, and freezes what it does not train."""
    if not missing and not layer.settings.is_meta:
        layer.settings = layer.settings.to(torch.uint8)  # "keep in float32" casts all tensors of a module
        found = settings.restored(layer.config, layer.settings, source)
        if found.spec != layer.config.spec:
            raise CheckpointError(
                f"{source} is of the polynomial {found.spec}, but config.json says {layer.config.spec}. They are of "
                "different models; save the model again with save_pretrained."
            )
        layer.config = found
    layer.freeze_unused()


def _refuse_shapes(
    polynomials: Mapping[str, PolyAttention], mismatched_keys: Iterable[tuple[str, Any, Any]], source: str
) -> None:
    """Raises CheckpointError if a polynomial's tensor has another shape in the checkpoint."""
    for key, found, needed in mismatched_keys:
        path, _ = _owner(key, polynomials)
        if path is not None:
            layer = polynomials[path]
            raise CheckpointError(
                f"{source}: tensor {key!r} has shape {tuple(found)}, but {layer.heads} heads of dim {layer.head_dim} "
                f"and the spec {layer.config.spec} need {tuple(needed)}. config.json and the weights are of different "
                "models; save the model again with save_pretrained."
            )


def _refuse_softmax(model: Any, unexpected_keys: Iterable[str], source: str) -> None:
    """Raises PatchError if a checkpoint has polynomials for modules that the model would run as softmax."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    softmax = set()
    for path in polynomial_paths(unexpected_keys):
        # The checkpoint may be of the bare model and this one have a head, or the other way round.
        softmax.update({path, prefix + path, path.removeprefix(prefix)} & modules.keys())
    if softmax:
        raise PatchError(
            f"{source} has polynomial attention at {sorted(softmax)}, but the config given to "
            f"{type(model).__name__} does not say so and it would silently be softmax. Load the checkpoint with "
            "its own config, or call unpatch_model(model) before saving it."
        )


def _refuse_absent(model: Any, unexpected_keys: Iterable[str], source: str) -> None:
    """Raises CheckpointError if a saved config names modules that neither the model nor the checkpoint has.

    A model may be loaded with fewer layers than it was saved with: then the checkpoint has their tensors.
    """
    named = getattr(model, SAVED_MODULES, None) or {}
    prefix = f"{model.base_model_prefix}."
    left_over = {path.removeprefix(prefix) for path in polynomial_paths(unexpected_keys)}
    attached = getattr(model.config, CONFIG_KEY, None) or {}
    absent = sorted(named.keys() - attached.get("modules", {}).keys() - left_over)
    if absent:
        raise CheckpointError(
            f"{source}: {CONFIG_KEY} names polynomial attention at {absent[:5]}{' …' if len(absent) > 5 else ''}, but "
            f"{type(model).__name__} has no such modules and the checkpoint no such tensors. {AGAIN}"
        )


def _refuse_implementation(model: Any, source: str) -> None:
    """Raises PatchError if a model's attention implementation is polynomial and nothing in it is."""
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation in IMPLEMENTATIONS and not is_patched(model):
        raise PatchError(
            f"{source}: attn_implementation is {implementation!r}, but there is no {CONFIG_KEY} and the model would "
            "silently be softmax. Load it with attn_implementation='sdpa' and call patch_model(model, spec)."
        )
