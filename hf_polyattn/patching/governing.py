"""The configs that decide for patched modules, and what they say of them: written, kept true, and read back."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import BackendError, PatchError, SpecError
from ..ops.backends import check_name
from ..spec import PolyAttentionConfig, Polynomial
from . import settings
from .core import CHILD_NAME, PolyAttention
from .families import attention_sites
from .ownership import claim_configs, is_part_of_a_build, join_configs, own_configs, owner_of
from .patched import active_child, bare_path, patched_layers, patched_modules, pretrained_model, require_patched
from .saved_config import CONFIG_KEY, IMPLEMENTATION, IMPLEMENTATIONS, SAVED_IMPLEMENTATION, is_armed, read_state
from .selection import new_child, why_not

# Where a model keeps the `modules` of the config that it was built from; None if that was written by hand.
SAVED_MODULES = "_polyattn_saved_modules"
# Where it keeps the `format_version` of that config.
SAVED_VERSION = "_polyattn_saved_version"


@dataclass(frozen=True, slots=True)
class GoverningConfig:
    """A config whose `_attn_implementation` decides for patched modules, the specs of those below, and the first."""

    config: PreTrainedConfig
    specs: dict[str, str]
    child: PolyAttention


def governing_configs(root: PreTrainedModel) -> list[GoverningConfig]:
    """Returns the configs of every submodel that holds patched modules, and of the modules themselves.

    The root's comes first. Specs are by path, relative to the outermost submodel with that config and without the
    prefix of a task head, so that they hold for the bare model and for every head.
    """
    patched = patched_modules(root)
    if not patched:  # any softmax model asks, when it is built and saved
        return []
    children = {path: active_child(module) for path, module in patched}
    found: dict[int, GoverningConfig] = {}
    for prefix, submodel in root.named_modules():
        if isinstance(submodel, PreTrainedModel) and id(submodel.config) not in found:
            below = {path: child for path, child in children.items() if _is_below(path, prefix)}
            if below:
                specs = {
                    bare_path(submodel, path[len(prefix) :].lstrip(".")): str(child.config.spec)
                    for path, child in below.items()
                }
                found[id(submodel.config)] = GoverningConfig(submodel.config, specs, next(iter(below.values())))
    for path, module in patched:
        found.setdefault(id(module.config), GoverningConfig(module.config, {}, children[path]))
    return list(found.values())


def armed_configs(root: PreTrainedModel) -> list[GoverningConfig]:
    """Returns the governing configs of a patched model, each with its guard.

    Where a submodel was patched, unpatched or loaded by itself, the models around it do not know: their configs learn
    it here.
    """
    owners = governing_configs(root)
    if any(not hasattr(owner.config, CONFIG_KEY) for owner in owners):
        own_configs(root)
        owners = governing_configs(root)
    if owners:
        join_configs(root)
    for owner in owners:
        if hasattr(owner.config, CONFIG_KEY):
            # A state dict that was loaded may have brought other settings.
            switches = {name: getattr(owner.child.config, name) for name in settings.FIELDS if name != "spec"}
            getattr(owner.config, CONFIG_KEY).update(switches, modules=owner.specs)
        else:
            arm(owner, patched_layers(root)[0][1].config, owner.config._attn_implementation)
    if not owners and hasattr(root.config, CONFIG_KEY):
        own_configs(root)
        disarm(root.config)
    return owners


def attach_saved(model: PreTrainedModel) -> None:
    """Adds the child modules that `model.config.polyattn_config` names, before weights are loaded.

    Runs for each submodel while a model is built; paths that are not below this one are left to the others.
    Notes under SAVED_MODULES what the config named, before it is brought up to date with what was found.

    Raises:
        SpecError: the saved config cannot be read, or its backend does not exist.
        PatchError: a named module exists but cannot be patched, or the config asks for another attention.
    """
    state = getattr(model.config, CONFIG_KEY, None)
    if state is None:
        armed_configs(model)  # a submodel may have come patched
        return
    if is_armed(model.config) and owner_of(model.config) not in set(model.modules()) and not is_part_of_a_build(model):
        own_configs(model)  # it was another model's
        state = getattr(model.config, CONFIG_KEY)
    source = f"the config of {model.config.name_or_path or type(model).__name__}"
    config = read_state(state, source)
    try:
        check_name(config.backend)
    except BackendError as error:
        raise SpecError(f"{source}: {error}") from None
    specs = state.get("modules")
    asked = model.config._attn_implementation
    if specs is not None and asked not in IMPLEMENTATIONS:
        raise PatchError(
            f"{source} is of a polynomial model, and attn_implementation {asked!r} was asked for. Leave it out; for "
            "softmax, load the model and call unpatch_model(model), or use softmax_attention(model) for a while."
        )
    inner = [part for part in model.modules() if part is not model and getattr(part, "config", None) is model.config]
    noted = [getattr(part, SAVED_MODULES) for part in inner if hasattr(part, SAVED_MODULES)]
    setattr(model, SAVED_MODULES, noted[0] if noted else specs)
    versions = [getattr(part, SAVED_VERSION) for part in inner if hasattr(part, SAVED_VERSION)]
    setattr(model, SAVED_VERSION, versions[0] if versions else state["format_version"])
    for site in attention_sites(model):
        if specs is None:  # written by hand beside a softmax checkpoint
            own = config.spec_of(site.layer) if why_not(site, config) is None else None
        else:
            own = specs.get(bare_path(model, site.path))
        if own is None:
            continue
        if site.obstacle is not None:
            raise PatchError(
                f"{source} names a polynomial at {site.path!r}, but {site.obstacle}. Save the model again."
            )
        if CHILD_NAME not in site.module._modules:
            child = new_child(site, dataclasses.replace(config, spec=own, layer_specs=()))
            child._is_hf_initialized = not config.interval  # until something is loaded, which may never happen
            site.module.add_module(CHILD_NAME, child)
    if not is_armed(model.config) or owner_of(model.config) in set(model.modules()):
        claim_configs(model)
    for owner in governing_configs(model):
        softmax = owner.config._attn_implementation
        if softmax in IMPLEMENTATIONS and is_armed(owner.config):  # a submodel came first
            softmax = getattr(owner.config, CONFIG_KEY)["softmax_implementation"]
        elif softmax in IMPLEMENTATIONS:  # from a checkpoint, whose `attn_implementation` was consumed at load
            softmax = model.get_correct_attn_implementation(None)
        arm(owner, config, softmax)


def reconfigure(model: nn.Module, **changes: Any) -> None:
    """Changes fields of the config in every patched layer and in the model's configs."""
    root = pretrained_model(model)
    for module in root.modules():
        if isinstance(module, PolyAttention):
            module.configure(dataclasses.replace(module.config, **changes))
    for owner in armed_configs(root):
        getattr(owner.config, CONFIG_KEY).update(changes)


def change_specs(model: nn.Module, specs: Mapping[str, Polynomial]) -> None:
    """Gives patched attention modules other polynomials, uncalibrated, on the intervals that they have.

    Args:
        model: patched.
        specs: polynomials by path of the attention module; the others keep theirs.

    Raises:
        PatchError: the model is not patched, or has no polynomial at one of the paths.
    """
    root = pretrained_model(model)
    require_patched(root)
    modules = dict(patched_modules(root))
    unknown = sorted(specs.keys() - modules.keys())
    if unknown:
        raise PatchError(f"{type(root).__name__} has no polynomial attention at {unknown}; it has it at {[*modules]}")
    for path, spec in specs.items():
        for child in modules[path].modules():  # PEFT keeps copies
            if isinstance(child, PolyAttention) and child.config.spec != spec:
                child.change_spec(spec)
    for owner in armed_configs(root):
        if owner.specs:
            commonest = Counter(owner.specs.values()).most_common(1)[0][0]
            getattr(owner.config, CONFIG_KEY).update(spec=commonest, layer_specs={})


def arm(owner: GoverningConfig, patch: PolyAttentionConfig, softmax_implementation: str) -> None:
    """Makes a config run "polyattn", and a Transformers without the plugin refuse to load it."""
    state = {**patch.to_dict(), "modules": owner.specs, "softmax_implementation": softmax_implementation}
    setattr(owner.config, CONFIG_KEY, state)
    owner.config.attn_implementation = SAVED_IMPLEMENTATION
    owner.config._attn_implementation_internal = IMPLEMENTATION


def disarm(config: PreTrainedConfig) -> None:
    """Makes a config run softmax again, as before `arm`."""
    config._attn_implementation_internal = getattr(config, CONFIG_KEY)["softmax_implementation"]
    delattr(config, CONFIG_KEY)
    del config.attn_implementation


def _is_below(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(prefix + ".")
