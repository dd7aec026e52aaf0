"""What each attention module of a model is, as a table."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..spec import PolyAttentionConfig
from ..tables import format_table
from .as_patched import weights_changed
from .core import CHILD_NAME
from .families import AttentionSite, attention_sites
from .patched import active_child, patched_layers, patched_modules, pretrained_model
from .running import implementation_of
from .saved_config import IMPLEMENTATIONS
from .selection import why_not


def describe(model: nn.Module) -> Description:
    """Returns what each attention module of a model is: a table that prints.

    Columns: module path, class, layer, heads, head dim, spec, and `patched` or why not. Below it stands whether the
    polynomials are calibrated.
    """
    root = pretrained_model(model)
    layers = dict(patched_modules(root))
    config = active_child(next(iter(layers.values()))).config if layers else PolyAttentionConfig()
    return table_of(attention_sites(root), config)


def warn_of_uncalibrated(root: PreTrainedModel, stacklevel: int) -> None:
    """Warns where what is saved is a pretrained softmax model with polynomials that nobody fitted to it.

    Uncalibrated is right as the start of a training. So it is only said of models that came from a checkpoint and whose
    weights and polynomials are sure to be as they were when `patch_model` was called: not of ones made from a config,
    nor after a training, nor of models that were loaded as they are.
    """
    layers = patched_layers(root)
    bare = [path for path, child in layers if not child.config.interval]
    if not bare or not root.name_or_path or weights_changed(root) is not False:
        return
    if not any(bool(child.delta.any()) for _, child in layers if not child.delta.is_meta):
        warnings.warn(
            f"{type(root).__name__} is saved uncalibrated, in {len(bare)} of {len(layers)} layers: its polynomials "
            "were never fitted to its weights, and what it computes is not what the softmax model did. Call "
            "calibrate(model, batches) first, unless it is the start of a training.",
            stacklevel=stacklevel + 1,
        )


@dataclass(frozen=True, slots=True)
class Description:
    """What `describe` returns.

    Attributes:
        rows: (path, class, layer, heads, head dim, spec, status) of each attention module.
        lengths: the fewest and the most keys that a row of the calibration saw; None if there was none.
        uncalibrated: how many modules have a polynomial that was never calibrated.
    """

    rows: tuple[tuple[str, str, int, int, int, str, str], ...]
    lengths: tuple[int, int] | None = None
    uncalibrated: int = 0

    def __str__(self) -> str:
        said = [format_table(("module", "class", "layer", "heads", "head dim", "spec", "status"), self.rows)]
        if self.lengths is not None:
            said.append(f"calibrated on rows of {self.lengths[0]} to {self.lengths[1]} keys")
        if self.uncalibrated:
            said.append(
                f"uncalibrated: {self.uncalibrated} of {len(self.rows)} modules. A pretrained model needs "
                "calibrate(model, batches); a training from scratch does not."
            )
        return "\n".join(said)


def table_of(sites: list[AttentionSite], config: PolyAttentionConfig) -> Description:
    """Returns the table of some attention modules, as `patch_model` with this config finds them."""
    rows, bare = [], 0
    for site in sites:
        spec, status = "softmax", why_not(site, config) or "can be patched"
        if CHILD_NAME in site.module._modules:
            child = active_child(site.module)
            spec, status = str(child.config), "patched"
            bare += not child.config.interval
            running = implementation_of(site.module)
            if running not in IMPLEMENTATIONS:
                status = f"patched, but running {running}"
        rows.append((site.path, site.class_name, site.layer, site.heads, site.head_dim, spec, status))
    return Description(tuple(rows), config.lengths, bare)
