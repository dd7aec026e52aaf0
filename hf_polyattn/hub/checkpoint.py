"""Guards on the files of a saved polynomial model: what a checkpoint may have, checked before it is read.

Once it is loaded, `loaded` looks at what it lacked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import CheckpointError
from ..patching import settings
from ..patching.core import CHILD_NAME
from ..patching.relative import warn_of_rounding
from ..patching.saved_config import CONFIG_KEY, mentions_polyattn
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
#: What to do about a damaged checkpoint.
AGAIN = "Download the checkpoint again (force_download=True), or calibrate the model and save it again."


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
        raise CheckpointError(f"{file} cannot be read as an index of shards: {error}. {AGAIN}") from None
    index = index if isinstance(index, dict) else {}
    shards = index.get("weight_map")
    whole = isinstance(shards, dict) and shards and all(isinstance(name, str) for name in shards.values())
    if not whole or not isinstance(index.get("metadata"), dict):
        raise CheckpointError(
            f"{file} is no index of shards: it must have 'metadata' and a 'weight_map' from the names of tensors to "
            f"those of files. {AGAIN}"
        )


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
                            f"{file}: tensor {name!r} has shape {shape}, more than any model. {AGAIN}"
                        )
                    yield name, content.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}. {AGAIN}") from None


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
                f"point with {TENSORS[name]} dimensions. {AGAIN}"
            )
        value = tensor.float()
        if not value.isfinite().all():
            raise CheckpointError(f"{source}: tensor {key!r} has NaN or infinite values. {AGAIN}")
        if name.endswith("coefficients"):
            warn_of_rounding(tensor, source)
        if name.endswith(_POSITIVE) and not (value > 0).all():
            raise CheckpointError(f"{source}: tensor {key!r} has values <= 0; it must be positive. {AGAIN}")


def polynomial_paths(keys: Iterable[str]) -> set[str]:
    """Returns the paths of the attention modules to whose polynomials state dict keys belong."""
    return {path for path, found, _ in (key.partition(f".{CHILD_NAME}.") for key in keys) if found}
