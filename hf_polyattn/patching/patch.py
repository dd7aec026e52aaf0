"""Turning the softmax attention of a Transformers model into polynomial attention, and back to the bit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import BackendError, PatchError, SpecError
from ..ops.backends import check_name
from ..spec import PolyAttentionConfig, Polynomial
from .attention import IMPLEMENTATION, IMPLEMENTATIONS, SAVED_IMPLEMENTATION
from .core import CHILD_NAME, PolyAttention
from .families import AttentionSite, attention_sites
from .saved_config import CONFIG_KEY, read_state

# Where a model keeps the `modules` of the config that it was built from; None if that was written by hand.
SAVED_MODULES = "_polyattn_saved_modules"

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def patch_model(
    model: AnyModule,
    config: str | Polynomial | PolyAttentionConfig,
    *,
    layers: Iterable[int] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    cross_attention: bool | None = None,
    dry_run: bool = False,
) -> AnyModule:
    """Makes the attention of a pretrained model polynomial, in place; its weights stay untouched.

    Args:
        model: a `PreTrainedModel` of any family whose attention uses the attention interface, or a PEFT,
            DDP or compiled wrapper around one.
        config: a spec string such as "poly3" or "poly6-l1", or a whole `PolyAttentionConfig`.
        layers: only these layer numbers; the others stay softmax.
        include: glob patterns on module paths; only what matches is patched.
        exclude: glob patterns on module paths that stay softmax on purpose.
        cross_attention: also patch cross-attention.
        dry_run: check, print what would happen and change nothing.

    Returns:
        The same model.

    Raises:
        SpecError: the config cannot be read.
        BackendError: the config's backend does not exist.
        PatchError: the model has nothing that can be patched, has attention that would silently stay
            softmax, or is already patched with another config. The model is left as it was.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> bert = patch_model(BertModel(BertConfig(**sizes)), "poly3")
    >>> is_patched(bert)
    True
    """
    config = _merge(config, layers, include, exclude, cross_attention)
    check_name(config.backend)
    root = pretrained_model(model)
    sites = attention_sites(root)
    if is_patched(root):
        _require_same(root, sites, config)
        return model

    _require_patchable(root, sites, config)
    if dry_run:
        print(_describe(sites, config))
        return model

    chosen = [site for site in sites if _why_not(site, config) is None]
    children = [_new_child(site, config) for site in chosen]
    for site, child in zip(chosen, children, strict=True):
        site.module.add_module(CHILD_NAME, child)
    for owner in governing_configs(root):
        _arm(owner, config, softmax_implementation=owner.config._attn_implementation)
    return model


def unpatch_model(model: AnyModule) -> AnyModule:
    """Restores softmax attention, in place: weights, logits and config are as before `patch_model`.

    Raises:
        PatchError: the model is not patched.
    """
    root = pretrained_model(model)
    _require_patched(root)
    owners = armed_configs(root)
    for _, module in _patched_modules(root):
        del module._modules[CHILD_NAME]
    for owner in owners:
        _disarm(owner.config)
    return model


@contextmanager
def softmax_attention(model: nn.Module) -> Iterator[None]:
    """Runs a patched model with its original softmax attention inside the `with` block.

    Raises:
        PatchError: the model is not patched.
    """
    root = pretrained_model(model)
    _require_patched(root)
    configs = [owner.config for owner in armed_configs(root)]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = getattr(config, CONFIG_KEY)["softmax_implementation"]
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def is_patched(model: nn.Module) -> bool:
    """Whether any attention module of the model is polynomial."""
    return any(isinstance(module, PolyAttention) for module in model.modules())


def patched_layers(model: nn.Module) -> list[tuple[str, PolyAttention]]:
    """Returns (path of the attention module, its `PolyAttention`) for each polynomial module, in model order.

    Under PEFT's `modules_to_save` it is the trained copy of the active adapter.
    """
    return [(path, active_child(module)) for path, module in _patched_modules(pretrained_model(model))]


def spec_of(model: nn.Module) -> str:
    """Returns the spec of a patched model's layers; all of them in layer order, joined by commas, if they differ."""
    specs = [str(child.config.spec) for _, child in patched_layers(model)]
    return ", ".join(specs) if len(set(specs)) > 1 else specs[0]


def describe(model: nn.Module) -> Description:
    """Returns what each attention module of a model is: a table that prints.

    Columns: module path, class, layer, heads, head dim, spec, and `patched` or why not.
    """
    root = pretrained_model(model)
    layers = dict(_patched_modules(root))
    config = active_child(next(iter(layers.values()))).config if layers else PolyAttentionConfig()
    return _describe(attention_sites(root), config)


@dataclass(frozen=True, slots=True)
class Description:
    """Rows of `describe`: (path, class, layer, heads, head dim, spec, status)."""

    rows: tuple[tuple[str, str, int, int, int, str, str], ...]

    def __str__(self) -> str:
        return format_table(("module", "class", "layer", "heads", "head dim", "spec", "status"), self.rows)


def format_table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Returns rows as aligned text columns under a header."""
    cells = [header, *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def pretrained_model(model: nn.Module) -> PreTrainedModel:
    """Returns the `PreTrainedModel` inside a PEFT, DDP, FSDP or compiled wrapper.

    Raises:
        PatchError: there is none.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif callable(getattr(inner, "get_base_model", None)):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise PatchError(
                f"expected a transformers PreTrainedModel or a wrapper around one, got {type(model).__name__}"
            )
    return inner


@dataclass(frozen=True, slots=True)
class GoverningConfig:
    """A config whose `_attn_implementation` decides for patched modules, and the specs of those below its owner."""

    config: PreTrainedConfig
    specs: dict[str, str]


def governing_configs(root: PreTrainedModel) -> list[GoverningConfig]:
    """Returns the configs of every submodel that holds patched modules, and of the modules themselves.

    The root's comes first. Specs are by path, relative to the outermost submodel with that config and without the
    prefix of a task head, so that they hold for the bare model and for every head.
    """
    patched = _patched_modules(root)
    if not patched:  # any softmax model asks, when it is built and saved
        return []
    specs = {path: str(active_child(module).config.spec) for path, module in patched}
    found: dict[int, GoverningConfig] = {}
    for prefix, submodel in root.named_modules():
        if isinstance(submodel, PreTrainedModel) and id(submodel.config) not in found:
            below = {
                bare_path(submodel, path[len(prefix) :].lstrip(".")): spec
                for path, spec in specs.items()
                if _is_below(path, prefix)
            }
            if below:
                found[id(submodel.config)] = GoverningConfig(submodel.config, below)
    for _, module in patched:
        found.setdefault(id(module.config), GoverningConfig(module.config, {}))
    return list(found.values())


def armed_configs(root: PreTrainedModel) -> list[GoverningConfig]:
    """Returns the governing configs of a patched model, each with its guard.

    Where a submodel was patched or unpatched by itself, the models around it do not know: their configs learn it here.
    """
    owners = governing_configs(root)
    for owner in owners:
        if hasattr(owner.config, CONFIG_KEY):
            getattr(owner.config, CONFIG_KEY)["modules"] = owner.specs
        else:
            _arm(owner, patched_layers(root)[0][1].config, owner.config._attn_implementation)
    if not owners and hasattr(root.config, CONFIG_KEY):
        _disarm(root.config)
    return owners


def active_child(module: nn.Module) -> PolyAttention:
    """Returns the `PolyAttention` that a patched attention module runs."""
    child: Any = module._modules[CHILD_NAME]
    if isinstance(child, PolyAttention):
        return child
    copies = getattr(child, "modules_to_save", {})  # PEFT's ModulesToSaveWrapper
    for adapter in getattr(child, "active_adapters", []):
        if adapter in copies:
            return copies[adapter]  # type: ignore[no-any-return]
    return child.original_module  # type: ignore[no-any-return]


def attach_saved(model: PreTrainedModel) -> None:
    """Adds the child modules that `model.config.polyattn_config` names, before weights are loaded.

    Runs for each submodel while a model is built; paths that are not below this one are left to the others.
    Notes under SAVED_MODULES what the config named, before it is brought up to date with what was found.

    Raises:
        SpecError: the saved config cannot be read, or its backend does not exist.
        PatchError: a named module exists but cannot be patched.
    """
    state = getattr(model.config, CONFIG_KEY, None)
    if state is None:
        armed_configs(model)  # a submodel may have come patched
        return
    source = f"the config of {model.config.name_or_path or type(model).__name__}"
    config = read_state(state, source)
    try:
        check_name(config.backend)
    except BackendError as error:
        raise SpecError(f"{source}: {error}") from None
    specs = state.get("modules")
    inner = [part for part in model.modules() if part is not model and getattr(part, "config", None) is model.config]
    noted = [getattr(part, SAVED_MODULES) for part in inner if hasattr(part, SAVED_MODULES)]
    setattr(model, SAVED_MODULES, noted[0] if noted else specs)
    for site in attention_sites(model):
        if specs is None:  # written by hand beside a softmax checkpoint
            own = config.spec_of(site.layer) if _why_not(site, config) is None else None
        else:
            own = specs.get(bare_path(model, site.path))
        if own is None:
            continue
        if site.obstacle is not None:
            raise PatchError(
                f"{source} names a polynomial at {site.path!r}, but {site.obstacle}. Save the model again."
            )
        if CHILD_NAME not in site.module._modules:
            site.module.add_module(CHILD_NAME, _new_child(site, dataclasses.replace(config, spec=own, layer_specs=())))
    for owner in governing_configs(model):
        softmax = owner.config._attn_implementation
        if softmax in IMPLEMENTATIONS and "attn_implementation" in vars(owner.config):  # armed: a submodel came first
            softmax = getattr(owner.config, CONFIG_KEY)["softmax_implementation"]
        elif softmax in IMPLEMENTATIONS:  # from a checkpoint, whose `attn_implementation` was consumed at load
            softmax = model.get_correct_attn_implementation(None)
        _arm(owner, config, softmax)


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
    _require_patched(root)
    modules = dict(_patched_modules(root))
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


def _arm(owner: GoverningConfig, patch: PolyAttentionConfig, softmax_implementation: str) -> None:
    """Makes a config run "polyattn", and a Transformers without the plugin refuse to load it."""
    state = {**patch.to_dict(), "modules": owner.specs, "softmax_implementation": softmax_implementation}
    setattr(owner.config, CONFIG_KEY, state)
    owner.config.attn_implementation = SAVED_IMPLEMENTATION
    owner.config._attn_implementation_internal = IMPLEMENTATION


def _disarm(config: PreTrainedConfig) -> None:
    config._attn_implementation_internal = getattr(config, CONFIG_KEY)["softmax_implementation"]
    delattr(config, CONFIG_KEY)
    del config.attn_implementation


def _new_child(site: AttentionSite, config: PolyAttentionConfig) -> PolyAttention:
    config = _own_config(site, config)
    device = next((parameter.device for parameter in site.module.parameters()), torch.device("cpu"))
    child = PolyAttention(config, site.heads, site.head_dim, device=device)
    return child.train(site.module.training)


def _own_config(site: AttentionSite, config: PolyAttentionConfig) -> PolyAttentionConfig:
    return dataclasses.replace(config, spec=config.spec_of(site.layer), layer_specs=())


def _merge(
    config: str | Polynomial | PolyAttentionConfig,
    layers: Iterable[int] | None,
    include: Iterable[str] | None,
    exclude: Iterable[str] | None,
    cross_attention: bool | None,
) -> PolyAttentionConfig:
    if not isinstance(config, PolyAttentionConfig):
        config = PolyAttentionConfig(Polynomial.parse(config))
    given = {"layers": layers, "include": include, "exclude": exclude, "cross_attention": cross_attention}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(config, **changes)


def _why_not(site: AttentionSite, config: PolyAttentionConfig) -> str | None:
    """Returns why a module is not to be patched, on purpose or not; None if it is."""
    if _excluded(site, config):
        return "excluded"
    if site.cross_attention and not config.cross_attention:
        return "cross-attention, not asked for"
    if config.layers is not None and site.layer not in config.layers:
        return "layer not asked for"
    return site.obstacle


def _excluded(site: AttentionSite, config: PolyAttentionConfig) -> bool:
    included = config.include is None or any(fnmatchcase(site.path, pattern) for pattern in config.include)
    return not included or any(fnmatchcase(site.path, pattern) for pattern in config.exclude)


def _require_patchable(root: PreTrainedModel, sites: list[AttentionSite], config: PolyAttentionConfig) -> None:
    name = type(root).__name__
    stuck = [site for site in sites if site.obstacle is not None and _why_not(site, config) == site.obstacle]
    if stuck:
        classes = sorted({f"{site.class_name} ({site.obstacle})" for site in stuck})
        raise PatchError(
            f"{name} has attention that would silently stay softmax: {'; '.join(classes)}, for example at "
            f"{stuck[0].path!r}. Pass exclude=[...] to leave these modules softmax on purpose."
        )
    asked = {*(config.layers or ()), *(layer for layer, _ in config.layer_specs)}
    if asked:
        known = {site.layer for site in sites}
        unknown = sorted(asked - known)
        if unknown:
            raise PatchError(f"{name} has no attention in layers {unknown}; it has layers {sorted(known)}")
    reasons = {_why_not(site, config) for site in sites}
    if None not in reasons:
        found = (
            f"its attention modules are all left out: {sorted(map(str, reasons))}"
            if sites
            else ("it has no attention module that uses Transformers' attention interface")
        )
        raise PatchError(f"{name} has no module that can be patched: {found}")


def _require_patched(root: PreTrainedModel) -> None:
    if not is_patched(root):
        raise PatchError(f"{type(root).__name__} is not patched; call patch_model(model, spec) first")


def _require_same(root: PreTrainedModel, sites: list[AttentionSite], config: PolyAttentionConfig) -> None:
    for site in sites:
        asked = _own_config(site, config) if _why_not(site, config) is None else None
        patched = CHILD_NAME in site.module._modules
        current = active_child(site.module).config if patched else None
        if asked is not None and current is not None:
            calibrated = {name: getattr(current, name) for name in ("interval", "clamp", "key_shift")}
            if current in (asked, dataclasses.replace(asked, **calibrated)):
                continue
        if (asked or current) is not None:
            raise PatchError(
                f"{type(root).__name__} is already patched, at {site.path!r} with {current or 'softmax'}; asked for "
                f"{asked or 'softmax'}. Call unpatch_model(model) first, or patch with the same config."
            )


def _patched_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in root.named_modules() if CHILD_NAME in module._modules]


def _is_below(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(prefix + ".")


def bare_path(model: PreTrainedModel, path: str) -> str:
    """Returns the path of a module without the prefix that a model with a task head puts before it."""
    prefix = model.base_model_prefix
    if prefix and hasattr(model, prefix):
        return path.removeprefix(prefix + ".")
    return path


def _describe(sites: list[AttentionSite], config: PolyAttentionConfig) -> Description:
    rows = []
    for site in sites:
        spec, status = "softmax", _why_not(site, config) or "can be patched"
        if CHILD_NAME in site.module._modules:
            spec, status = str(active_child(site.module).config), "patched"
            config_of_module: Any = site.module.config
            if config_of_module._attn_implementation not in IMPLEMENTATIONS:
                status = f"patched, but running {config_of_module._attn_implementation}"
        rows.append((site.path, site.class_name, site.layer, site.heads, site.head_dim, spec, status))
    return Description(tuple(rows))
