"""What each attention module of a model is, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..spec import PolyAttentionConfig
from ..tables import format_table
from .core import CHILD_NAME
from .families import AttentionSite, attention_sites
from .patched import active_child, patched_modules, pretrained_model
from .saved_config import IMPLEMENTATIONS
from .selection import why_not


def describe(model: nn.Module) -> Description:
    """Returns what each attention module of a model is: a table that prints.

    Columns: module path, class, layer, heads, head dim, spec, and `patched` or why not.
    """
    root = pretrained_model(model)
    layers = dict(patched_modules(root))
    config = active_child(next(iter(layers.values()))).config if layers else PolyAttentionConfig()
    return table_of(attention_sites(root), config)


@dataclass(frozen=True, slots=True)
class Description:
    """What `describe` returns.

    Attributes:
        rows: (path, class, layer, heads, head dim, spec, status) of each attention module.
        lengths: the fewest and the most keys that a row of the calibration saw; None if there was none.
    """

    rows: tuple[tuple[str, str, int, int, int, str, str], ...]
    lengths: tuple[int, int] | None = None

    def __str__(self) -> str:
        table = format_table(("module", "class", "layer", "heads", "head dim", "spec", "status"), self.rows)
        if self.lengths is None:
            return table
        return f"{table}\ncalibrated on rows of {self.lengths[0]} to {self.lengths[1]} keys"


def table_of(sites: list[AttentionSite], config: PolyAttentionConfig) -> Description:
    """Returns the table of some attention modules, as `patch_model` with this config finds them."""
    rows = []
    for site in sites:
        spec, status = "softmax", why_not(site, config) or "can be patched"
        if CHILD_NAME in site.module._modules:
            spec, status = str(active_child(site.module).config), "patched"
            config_of_module: Any = site.module.config
            if config_of_module._attn_implementation not in IMPLEMENTATIONS:
                status = f"patched, but running {config_of_module._attn_implementation}"
        rows.append((site.path, site.class_name, site.layer, site.heads, site.head_dim, spec, status))
    return Description(tuple(rows), config.lengths)
