"""Which attention modules a config chooses, and the polynomial that each of them gets."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase

import torch

from ..spec import PolyAttentionConfig
from .core import PolyAttention
from .families import AttentionSite


def why_not(site: AttentionSite, config: PolyAttentionConfig) -> str | None:
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


def new_child(site: AttentionSite, config: PolyAttentionConfig) -> PolyAttention:
    """Returns the uncalibrated polynomial of one attention module, on its device and in its mode."""
    config = own_config(site, config)
    device = next((parameter.device for parameter in site.module.parameters()), torch.device("cpu"))
    child = PolyAttention(config, site.heads, site.head_dim, device=device)
    return child.train(site.module.training)


def own_config(site: AttentionSite, config: PolyAttentionConfig) -> PolyAttentionConfig:
    """Returns the config of one attention module, with the polynomial of its layer."""
    return dataclasses.replace(config, spec=config.spec_of(site.layer), layer_specs=())
