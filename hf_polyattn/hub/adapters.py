"""Adapters carry the polynomials of the base model that they were trained on, and bring them back or refuse.

An adapter of PEFT has no more than its own weights and the name of a base model, which may be softmax: the polynomials
may have been put into it in memory. So `polyattn.safetensors` lies beside the adapter: the base model's polynomials,
and its `polyattn_config` in the file's metadata.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, PatchError
from ..files import written_beside
from ..patching import settings
from ..patching.core import CHILD_NAME, PolyAttention, is_patched
from ..patching.families import AttentionSite, attention_sites
from ..patching.governing import armed_configs
from ..patching.patch import put_in
from ..patching.patched import bare_path, loaded, patched_modules, pretrained_model, require_in_memory
from ..patching.relative import no_change
from ..patching.saved_config import CONFIG_KEY, read_state
from ..patching.selection import new_child
from ..spec import PolyAttentionConfig
from .checkpoint import ALWAYS, check_tensors

FILE = "polyattn.safetensors"
_GIVEN = "given an adapter that was trained on polynomials"
_HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


def save_polynomials(model: nn.Module, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Writes the base model's polynomials into an adapter's folder, or removes what an earlier base model left there.

    Args:
        model: with the adapter.
        folder: of the adapter.
        state_dict: of the whole model, where its own tensors are sharded.
    """
    root = pretrained_model(model)
    if not is_patched(root):
        (folder / FILE).unlink(missing_ok=True)
        return
    armed_configs(root)
    tensors = {}
    for path, child in _base_polynomials(root).items():
        for name, tensor in _read_state(child).items():
            found = [t for key, t in (state_dict or {}).items() if key.endswith(f"{path}.{CHILD_NAME}.{name}")]
            tensors[f"{bare_path(root, path)}.{CHILD_NAME}.{name}"] = (found or [tensor])[0].detach().cpu().contiguous()
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(getattr(root.config, CONFIG_KEY))}
    with written_beside(folder / FILE) as partial:
        save_file(tensors, partial, metadata=metadata)


def restore_polynomials(
    model: nn.Module, source: Any, *, alone: bool = True, again: bool = False, **options: Any
) -> None:
    """Gives a base model the polynomials that an adapter was trained on; does nothing if the adapter has none.

    Args:
        model: the base model, or one with other adapters around it.
        source: folder or Hub id of the adapter.
        alone: whether the base model has no other adapter.
        again: whether the model has this adapter and goes back to what it was, with polynomials that trained along.
        **options: of the download: subfolder, revision, token …

    Raises:
        PatchError: the base model has other polynomials, or other adapters run on its softmax, or it is offloaded and
            would have to be given polynomials.
        CheckpointError: the file beside the adapter is damaged, or of another model.
    """
    file = _find(source, options)
    if file is None:
        return
    state, config, tensors = _read(file)
    root = pretrained_model(model)
    if not getattr(root, "hf_device_map", None):  # PEFT leaves adapters without weights on what `cpu_offload` took
        require_in_memory(root, _GIVEN)
    if is_patched(root):
        _take(root, file, state["modules"], tensors, again and alone)
        return
    if not alone:
        raise PatchError(
            f"{source}: the adapter was trained on polynomial attention, and other adapters of this model run on "
            "softmax. Load it onto a base model of its own."
        )
    require_in_memory(root, _GIVEN)
    sites = {bare_path(root, site.path): site for site in attention_sites(root)}
    children: list[tuple[AttentionSite, PolyAttention]] = []
    for path, spec in state["modules"].items():
        if path not in sites or sites[path].obstacle is not None:
            raise CheckpointError(
                f"{file} has a polynomial for {path!r}, where {type(root).__name__} has no attention that can be "
                "patched. Load the adapter onto the base model that adapter_config.json names."
            )
        child = new_child(sites[path], dataclasses.replace(config, spec=spec, layer_specs=()))
        _load(child, tensors, path, file)
        child.train_polynomial(False)  # as PEFT does with all of a base model
        children.append((sites[path], child))
    put_in(model, children, config)


def _base_polynomials(root: nn.Module) -> dict[str, PolyAttention]:
    """Returns the polynomials by module path, without the copies of `modules_to_save`: an adapter has those itself."""
    children: dict[str, Any] = {path: module._modules[CHILD_NAME] for path, module in patched_modules(root)}
    return {path: getattr(child, "original_module", child) for path, child in children.items()}


def _read_state(child: PolyAttention) -> dict[str, Tensor]:
    """Returns the tensors of a polynomial, on the CPU, wherever Accelerate keeps them."""
    with loaded(child):
        return {name: tensor.detach().cpu() for name, tensor in child.state_dict().items()}


def _take(root: Any, file: Path, specs: Mapping[str, str], tensors: Mapping[str, Tensor], again: bool) -> None:
    """Checks that a patched base model has an adapter's polynomials; gives them to it if it is not calibrated yet."""
    ours = {bare_path(root, path): child for path, child in _base_polynomials(root).items()}
    found = {path: str(child.config.spec) for path, child in ours.items()}
    other = sorted(path for path in found.keys() | specs.keys() if found.get(path) != specs.get(path))
    advice = "Call unpatch_model(base_model) before loading: the adapter brings its own polynomials."
    if other:
        path = other[0]
        raise PatchError(
            f"{file}: the adapter was trained with {specs.get(path, 'softmax')} at {path!r}, where the base model has "
            f"{found.get(path, 'softmax')}. {advice}"
        )
    fresh: list[str] = []
    different: list[str] = []
    for path, child in ours.items():
        state, saved = _read_state(child), _of(tensors, path)
        if state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in state):
            continue
        start = PolyAttention(child.config, child.heads, child.head_dim).state_dict()
        untouched = all(torch.equal(state[name], start[name]) for name in start)
        (fresh if untouched or again else different).append(path)
    if different:
        shown = f"{different[:5]}{' …' if len(different) > 5 else ''}"
        raise PatchError(
            f"{file}: the base model's polynomials at {shown} are not those that the adapter was trained on. {advice}"
        )
    if fresh:
        require_in_memory(root, _GIVEN)
    for path in fresh:
        _load(ours[path], tensors, path, file)


def _load(child: PolyAttention, tensors: Mapping[str, Tensor], path: str, file: Path) -> None:
    try:
        child.load_state_dict(_of(tensors, path))
    except RuntimeError as error:
        raise CheckpointError(f"{file}: the polynomial of {path!r} is of another model: {error}") from None


def _key(path: str, name: str) -> str:
    return f"{path}.{CHILD_NAME}.{name}"


def _of(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Returns the tensors of one polynomial, by their names in it."""
    prefix = _key(path, "")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _read(file: Path) -> tuple[dict[str, Any], PolyAttentionConfig, dict[str, Tensor]]:
    """Returns the config and the polynomials that lie beside an adapter.

    Raises:
        CheckpointError: the file is damaged, or lacks some of them.
        SpecError: its config cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    advice = "Download the adapter again, or save it again."
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            state = json.loads((content.metadata() or {}).get(CONFIG_KEY, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. {advice}") from None
    config = read_state(state, str(file))
    if "modules" not in state:
        raise CheckpointError(f"{file}: its {CONFIG_KEY} names no modules. {advice}")
    missing = sorted({_key(path, name) for path in state["modules"] for name in ALWAYS} - tensors.keys())
    if missing:
        raise CheckpointError(f"{file} lacks {missing[:5]}. {advice}")
    check_tensors(str(file), tensors.items())
    return state, config, with_changes(tensors, str(file))


def with_changes(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Returns an adapter's tensors, and the change of each polynomial in them: none, if an earlier version saved it.

    Raises:
        CheckpointError: damaged settings.
    """
    found = dict(tensors)
    end = f".{CHILD_NAME}.{settings.NAME}"
    for key in [key for key in tensors if key.endswith(end)]:
        path = key.removesuffix(end)
        config = PolyAttentionConfig(**settings.decoded(tensors[key], f"{source}: tensor {key!r}"))
        added = no_change(_of(tensors, path), config)
        found |= {_key(path, name): tensor for name, tensor in added.items()}
    return found


def _find(source: Any, options: Mapping[str, Any]) -> Path | None:
    """Returns the file beside an adapter, from its folder or from the Hub; None if there is none."""
    folder = Path(source)
    if folder.is_dir():
        file = folder / (options.get("subfolder") or "") / FILE
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    chosen = {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}
    try:
        return Path(hf_hub_download(str(source), FILE, **chosen))
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):  # of the adapter itself PEFT will complain
        return None
