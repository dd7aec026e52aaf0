"""Turning the softmax attention of a Transformers model into polynomial attention, and back to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..errors import PatchError
from ..ops.backends import check_name
from ..spec import CALIBRATED, PolyAttentionConfig, Polynomial
from .as_patched import forget_weights, note_weights
from .core import CHILD_NAME, PolyAttention, is_patched
from .description import table_of
from .families import AttentionSite, attention_sites
from .governing import arm, armed_configs, disarm, governing_configs
from .ownership import own_configs
from .patched import active_child, patched_modules, pretrained_model, require_in_memory, require_patched
from .running import SOFTMAX_BLOCK
from .saved_config import CONFIG_KEY
from .selection import new_child, own_config, why_not
from .threads import alone

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

    `model.config` becomes a copy of what it was: other models built from the same config object stay as they are.

    Args:
        model: a `PreTrainedModel` of any family whose attention uses the attention interface, or a module around one:
            PEFT's, DDP's, a compiled one, a SentenceTransformer, a CrossEncoder, one's own.
        config: a spec string such as "poly3" or "poly6-l1", or a whole `PolyAttentionConfig`.
        layers: only these layer numbers; the others stay softmax.
        include: glob patterns on module paths; only what matches is patched.
        exclude: glob patterns on module paths that stay softmax on purpose.
        cross_attention: also patch cross-attention.
        dry_run: check, print what would happen and change nothing.

    Returns:
        The same model. In one that has adapters of PEFT, polynomials are frozen like the rest of the base model.

    Raises:
        SpecError: the config cannot be read.
        BackendError: the config's backend does not exist.
        PatchError: the model has nothing that can be patched, has attention that would silently stay
            softmax, is offloaded, or is already patched with another config. The model is left as it was.

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
    require_in_memory(root, "patched")
    if dry_run:
        print(table_of(sites, config))
        return model

    chosen = [site for site in sites if why_not(site, config) is None]
    children = [(site, new_child(site, config)) for site in chosen]
    adapters = getattr(root, "peft_config", None)
    if adapters:
        _require_no_copies(adapters)
        for _, child in children:
            child.train_polynomial(False)
    put_in(model, children, config)
    return model


def put_in(model: nn.Module, children: list[tuple[AttentionSite, PolyAttention]], config: PolyAttentionConfig) -> None:
    """Gives attention modules of a softmax model, or of the one inside of a wrapper, their polynomials."""
    note_weights(pretrained_model(model))
    for site, child in children:
        site.module.add_module(CHILD_NAME, child)
    own_configs(model)
    for owner in governing_configs(pretrained_model(model)):
        arm(owner, config, softmax_implementation=owner.config._attn_implementation)


def unpatch_model(model: AnyModule) -> AnyModule:
    """Restores softmax attention, in place: weights, logits and config are as before `patch_model`.

    Raises:
        PatchError: the model is not patched.
    """
    root = pretrained_model(model)
    require_patched(root)
    owners = armed_configs(root)
    for _, module in patched_modules(root):
        del module._modules[CHILD_NAME]
    for owner in owners:
        disarm(owner.config)
    forget_weights(root)
    return model


@contextmanager
def softmax_attention(model: nn.Module) -> Iterator[None]:
    """Runs a patched model with its original softmax attention inside the `with` block, in this thread.

    Raises:
        PatchError: the model is not patched, or another thread has it in such a block. Other threads that run the model
            meanwhile get this error, too.
    """
    root = pretrained_model(model)
    require_patched(root)
    with alone(root, SOFTMAX_BLOCK):
        configs = [owner.config for owner in armed_configs(root)]
        before = [config._attn_implementation for config in configs]
        try:
            for config in configs:
                config._attn_implementation_internal = getattr(config, CONFIG_KEY)["softmax_implementation"]
            yield
        finally:
            for config, implementation in zip(configs, before, strict=True):
                config._attn_implementation_internal = implementation


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


def _require_no_copies(adapters: Mapping[str, Any]) -> None:
    """Raises PatchError if adapters were to train polynomials that were not there when PEFT made its copies."""
    names = [name for name, given in adapters.items() if CHILD_NAME in (getattr(given, "modules_to_save", None) or ())]
    if names:
        raise PatchError(
            f"the adapters {names} have modules_to_save={[CHILD_NAME]}, but were made before there were polynomials "
            "and would neither train nor save them. Call patch_model(base_model, spec) before get_peft_model."
        )


def _require_patchable(root: PreTrainedModel, sites: list[AttentionSite], config: PolyAttentionConfig) -> None:
    name = type(root).__name__
    stuck = [site for site in sites if site.obstacle is not None and why_not(site, config) == site.obstacle]
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
    reasons = {why_not(site, config) for site in sites}
    if None not in reasons:
        found = (
            f"its attention modules are all left out: {sorted(map(str, reasons))}"
            if sites
            else ("it has no attention module that uses Transformers' attention interface")
        )
        raise PatchError(f"{name} has no module that can be patched: {found}")


def _require_same(root: PreTrainedModel, sites: list[AttentionSite], config: PolyAttentionConfig) -> None:
    for site in sites:
        asked = own_config(site, config) if why_not(site, config) is None else None
        patched = CHILD_NAME in site.module._modules
        current = active_child(site.module).config if patched else None
        if asked is not None and current is not None:
            calibrated = {name: getattr(current, name) for name in CALIBRATED}
            if current in (asked, dataclasses.replace(asked, **calibrated)):
                continue
        if (asked or current) is not None:
            raise PatchError(
                f"{type(root).__name__} is already patched, at {site.path!r} with {_difference(current, asked)}; asked "
                f"for {_difference(asked, current)}. Call unpatch_model(model) first, or patch with the same config."
            )


def _difference(config: PolyAttentionConfig | None, other: PolyAttentionConfig | None) -> str:
    """Returns what to say of a module's config beside another: its spec and, if that is the same, what differs."""
    if config is None:
        return "softmax"
    if other is None or config.spec != other.spec:
        return str(config)
    names = [field.name for field in dataclasses.fields(config)]
    differing = [name for name in names if getattr(config, name) != getattr(other, name)]
    differing = [name for name in differing if name not in CALIBRATED] or differing
    return f"{config} and {', '.join(f'{name}={getattr(config, name)!r}' for name in differing)}"
