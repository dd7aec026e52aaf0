"""Guards on saved polynomial models: what a checkpoint must have, checked before it is read and once it is loaded."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..errors import CheckpointError, PatchError
from ..patching import settings
from ..patching.core import CHILD_NAME, PolyAttention, is_patched
from ..patching.governing import SAVED_MODULES, SAVED_VERSION
from ..patching.relative import CHANGES, no_change, warn_of_rounding
from ..patching.resuming import mark_untrained
from ..patching.saved_config import CONFIG_KEY, IMPLEMENTATIONS, mentions_polyattn
from ..spec import MAX_REFINEMENTS

#: The tensors that every polynomial has.
ALWAYS = ("coefficients", "center", "key_shift", "radius", settings.NAME)
# Dimensions of each tensor. A refinement's are below "refinements.<number>.".
_POLYNOMIAL = {"coefficients": 2, "delta": 2, "directions": 3}
TENSORS = {
    **_POLYNOMIAL,
    **{"center": 1, "key_shift": 2, "radius": 1, settings.NAME: 1},
    **{f"moments.{name}": 2 for name in ("weights", "length_shift", "means", "scales")},
    **{"moments.squares": 3, "moments.lengths": 1},
    **{f"refinements.{number}.{name}": dims
       for number in range(MAX_REFINEMENTS)
       for name, dims in {**_POLYNOMIAL, "steps": 2, "center": 1, "radius": 1}.items()},
}  # fmt: skip
_POSITIVE = ("radius", "scales", "lengths")
_MAX_ELEMENTS = 2**20  # 1,024 heads with a key shift of 1,024 numbers each
_AGAIN = "Download the checkpoint again (force_download=True), or calibrate the model and save it again."


def check_files(
    config: PreTrainedConfig,
    files: Sequence[str] | None,
    state_dict: Mapping[str, Tensor] | None,
    sharded_metadata: Mapping[str, Any] | None,
) -> None:
    """Checks the files of a checkpoint whose config names polynomials, and the polynomials in them, before loading.

    Args:
        config: the model's.
        files: that will be loaded.
        state_dict: what is loaded in place of files.
        sharded_metadata: of the index of shards, if there is one: `weight_map` has their names.

    Raises:
        CheckpointError: a file that is not safetensors, cannot be read or lies outside the checkpoint's folder; a
            polynomial tensor that is unknown, of a wrong type or not finite; a radius that is not positive.
    """
    if not _names_polynomials(config):
        return
    if state_dict is not None:
        check_tensors("the state dict", state_dict.items())
        return
    shards = {Path(name) for name in (sharded_metadata or {}).get("weight_map", {}).values()}
    for file in sorted({*shards, *map(Path, files or ())}):
        if ".." in file.parts or (file in shards and file.is_absolute()):
            raise CheckpointError(
                f"{config.name_or_path or 'the checkpoint'}: the index of shards names {str(file)!r}, outside the "
                "checkpoint's folder. Do not load this checkpoint; ask who made it for one that save_pretrained wrote."
            )
    for name in files or ():
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{name} is not a safetensors file, and polynomial models are loaded from no other: a pickle can run "
                "code. Load it where you trust it and save it again with save_pretrained."
            )
        check_tensors(name, _polynomial_tensors(name))


def check_index(file: str) -> None:
    """Checks the index of the shards of a polynomial checkpoint, before Transformers reads it.

    Raises:
        CheckpointError: it is not JSON, or has no `metadata` and no `weight_map` from tensors to file names.
    """
    config = Path(file).with_name("config.json")
    if not (Path(file).is_file() and config.is_file() and mentions_polyattn(config)):
        return
    try:
        index = json.loads(Path(file).read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as an index of shards: {error}. {_AGAIN}") from None
    index = index if isinstance(index, dict) else {}
    shards = index.get("weight_map")
    whole = isinstance(shards, dict) and shards and all(isinstance(name, str) for name in shards.values())
    if not whole or not isinstance(index.get("metadata"), dict):
        raise CheckpointError(
            f"{file} is no index of shards: it must have 'metadata' and a 'weight_map' from the names of tensors to "
            f"those of files. {_AGAIN}"
        )


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
    for key, found, needed in info.mismatched_keys:
        path, _ = _owner(key, polynomials)
        if path is not None:
            layer = polynomials[path]
            raise CheckpointError(
                f"{source}: tensor {key!r} has shape {tuple(found)}, but {layer.heads} heads of dim {layer.head_dim} "
                f"and the spec {layer.config.spec} need {tuple(needed)}. config.json and the weights are of different "
                "models; save the model again with save_pretrained."
            )
    missing: dict[str, set[str]] = defaultdict(set)
    for key in info.missing_keys:
        path, name = _owner(key, polynomials)
        if path is not None:
            missing[path].add(name)
    for path in [*missing]:
        given = _set_no_change(polynomials[path], missing[path], f"{source}: the polynomial {path!r}")
        info.missing_keys.difference_update(f"{path}.{name}" for name in given)
        missing[path] -= given
        if not missing[path]:
            del missing[path]
    versions = {getattr(module, SAVED_VERSION, None) for module in model.modules()}
    if 1 in versions:  # which had no settings
        for path in [path for path, names in missing.items() if names == {settings.NAME}]:
            del missing[path]
            info.missing_keys.discard(f"{path}.{settings.NAME}")
            polynomials[path].settings = settings.encoded(polynomials[path].config, polynomials[path].place)
    for layer in polynomials.values():
        layer._is_hf_initialized = True
    saved = any(getattr(module, SAVED_MODULES, None) is not None for module in model.modules())
    for path, names in sorted(missing.items()):
        if saved or len(names) < len(polynomials[path].state_dict()):
            raise CheckpointError(
                f"{source}: {sorted(names)} of the polynomial {path!r} are missing, which config.json says is there. "
                f"{_AGAIN} For a softmax checkpoint with a config written by hand, leave 'modules' out of {CONFIG_KEY}."
            )
        polynomials[path]._is_hf_initialized = False
    for path, layer in polynomials.items():
        _take_settings(layer, f"{source}: {path}.{settings.NAME}", f"{path}.{settings.NAME}" in info.missing_keys)
    absent = _absent_modules(model, info.unexpected_keys)
    if absent:
        raise CheckpointError(
            f"{source}: {CONFIG_KEY} names polynomial attention at {absent[:5]}{' …' if len(absent) > 5 else ''}, but "
            f"{type(model).__name__} has no such modules and the checkpoint no such tensors. {_AGAIN}"
        )
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation in IMPLEMENTATIONS and not is_patched(model):
        raise PatchError(
            f"{source}: attn_implementation is {implementation!r}, but there is no {CONFIG_KEY} and the model would "
            "silently be softmax. Load it with attn_implementation='sdpa' and call patch_model(model, spec)."
        )


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


def _owner(key: str, polynomials: Mapping[str, PolyAttention]) -> tuple[str | None, str]:
    """Returns the path of the polynomial that a state dict key belongs to, None if none, and the name below it."""
    path, name = key, ""
    while path:
        path, _, last = path.rpartition(".")
        name = f"{last}.{name}" if name else last
        if path in polynomials:
            return path, name
    return None, key


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


def _names_polynomials(config: PreTrainedConfig) -> bool:
    if getattr(config, CONFIG_KEY, None) is not None:
        return True
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return any(isinstance(part, PreTrainedConfig) and _names_polynomials(part) for part in parts)


def _polynomial_tensors(file: str) -> Iterator[tuple[str, Any]]:
    """Yields names and slices of the polynomial tensors in a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 - it is not a dict
                if f".{CHILD_NAME}." in name:
                    shape = content.get_slice(name).get_shape()
                    if torch.Size(shape).numel() > _MAX_ELEMENTS:
                        raise CheckpointError(
                            f"{file}: tensor {name!r} has shape {shape}, more than any model. {_AGAIN}"
                        )
                    yield name, content.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}. {_AGAIN}") from None


def check_tensors(source: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises CheckpointError if one of the tensors is a polynomial's and unknown, of a wrong type or not finite."""
    for key, tensor in tensors:
        _, found, name = key.partition(f".{CHILD_NAME}.")
        if not found:
            continue
        if name not in TENSORS:
            raise CheckpointError(
                f"{source}: {key!r} is no tensor of a polynomial; there are {sorted(TENSORS)}. "
                "Install the hf_polyattn that wrote it: pip install --upgrade hf_polyattn."
            )
        if name == settings.NAME:
            settings.decoded(tensor, f"{source}: tensor {key!r}")
            continue
        if not tensor.is_floating_point() or tensor.dim() != TENSORS[name]:
            raise CheckpointError(
                f"{source}: tensor {key!r} is {tensor.dtype} with shape {tuple(tensor.shape)}; it must be floating "
                f"point with {TENSORS[name]} dimensions. {_AGAIN}"
            )
        value = tensor.float()
        if not value.isfinite().all():
            raise CheckpointError(f"{source}: tensor {key!r} has NaN or infinite values. {_AGAIN}")
        if name.endswith("coefficients"):
            warn_of_rounding(tensor, source)
        if name.endswith(_POSITIVE) and not (value > 0).all():
            raise CheckpointError(f"{source}: tensor {key!r} has values <= 0; it must be positive. {_AGAIN}")


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


def _absent_modules(model: Any, unexpected_keys: Iterable[str]) -> list[str]:
    """Returns the modules that a saved config names and neither the model nor the checkpoint has.

    A model may be loaded with fewer layers than it was saved with: then the checkpoint has their tensors.
    """
    named = getattr(model, SAVED_MODULES, None) or {}
    prefix = f"{model.base_model_prefix}."
    left_over = {path.removeprefix(prefix) for path in polynomial_paths(unexpected_keys)}
    attached = getattr(model.config, CONFIG_KEY, None) or {}
    return sorted(named.keys() - attached.get("modules", {}).keys() - left_over)


def polynomial_paths(keys: Iterable[str]) -> set[str]:
    """Returns the paths of the attention modules to whose polynomials state dict keys belong."""
    return {path for path, found, _ in (key.partition(f".{CHILD_NAME}.") for key in keys) if found}
