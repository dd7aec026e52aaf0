"""What the tensors of a polynomial mean, kept in a tensor beside them: it goes wherever a state dict goes.

A state dict, an adapter or a distributed checkpoint has no config.json. So every `PolyAttention` has a buffer
`settings`, uint8 (256,): JSON, padded with zeros, of all that a forward pass takes from Python.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, SpecError
from ..spec import FORMAT_VERSION, PolyAttentionConfig

NAME = "settings"
BYTES = 256

# Fields of a config that say which modules are patched, what trains, or by what, or that are a tensor's shape.
_NO_SETTINGS = {
    "layers", "layer_specs", "include", "exclude", "cross_attention", "granularity", "learnable", "backend",
}  # fmt: skip
_AGAIN = "Load an undamaged checkpoint, or calibrate the model and save it again."
_UPGRADE = "Install the hf_polyattn that wrote it: pip install --upgrade hf_polyattn."
FIELDS = tuple(field.name for field in dataclasses.fields(PolyAttentionConfig) if field.name not in _NO_SETTINGS)


def encoded(config: PolyAttentionConfig, device: torch.device | None = None) -> Tensor:
    """Returns the settings of one attention module's config, uint8 (256,)."""
    values = config.to_dict()
    text = json.dumps({"version": FORMAT_VERSION, **{name: values[name] for name in FIELDS}}, separators=(",", ":"))
    return torch.tensor(list(text.encode().ljust(BYTES, b"\0")), dtype=torch.uint8, device=device)


def decoded(settings: Tensor, source: str) -> dict[str, Any]:
    """Returns the fields of a config that settings hold.

    Args:
        settings: uint8 (256,), or another dtype that they were cast to, which holds them exactly.
        source: the tensor's name, and its file if there is one, named by errors.

    Raises:
        CheckpointError: no settings, or not of this version.
    """
    numbers = settings.to(torch.uint8)
    if numbers.shape != (BYTES,) or not torch.equal(numbers.to(settings.dtype), settings):
        raise CheckpointError(
            f"{source} is {settings.dtype} with shape {tuple(settings.shape)}; settings are uint8 ({BYTES},). {_AGAIN}"
        )
    try:
        values: Any = json.loads(bytes(numbers.tolist()).rstrip(b"\0"))
    except ValueError as error:
        raise CheckpointError(f"{source} holds no JSON: {error}. {_AGAIN}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{source} holds a {type(values).__name__}, not a mapping of {FIELDS}. {_AGAIN}")
    version = values.pop("version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{source} has version {version!r}; this hf_polyattn reads {FORMAT_VERSION}. {_UPGRADE}")
    unknown, missing = sorted(values.keys() - {*FIELDS}), sorted({*FIELDS} - values.keys())
    if unknown:
        raise CheckpointError(f"{source} has unknown fields {unknown}; known are {sorted(FIELDS)}. {_UPGRADE}")
    if missing:
        raise CheckpointError(f"{source} lacks {missing}. {_AGAIN}")
    try:
        PolyAttentionConfig(**values)
    except SpecError as error:
        raise CheckpointError(f"{source}: {error}. {_AGAIN}") from None
    return values


def restored(config: PolyAttentionConfig, settings: Tensor, source: str) -> PolyAttentionConfig:
    """Returns a module's config with the settings that came with its tensors.

    Args:
        config: of the module that takes the tensors.
        settings: uint8 (256,).
        source: named by errors.

    Raises:
        CheckpointError: no settings of this version, or of a polynomial of another degree than the module's.
    """
    found = dataclasses.replace(config, **decoded(settings, source))
    if found.spec.degree != config.spec.degree:
        raise CheckpointError(
            f"{source} is of the polynomial {found.spec}, but this attention module has {config.spec}, which has "
            f"another degree. Patch the model with {str(found.spec)!r} first, then load."
        )
    return found
