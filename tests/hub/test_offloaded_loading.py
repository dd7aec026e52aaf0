"""Polynomials of offloaded layers are those of the checkpoint, whoever offloads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from safetensors.torch import load_file
from transformers import AutoConfig

import hf_polyattn as hp
from hf_polyattn.patching.patched import patched_layers

BASE = {
    "minilm": "AutoModelForSequenceClassification",
    "gpt2-zinc": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
}
LAYERS = {"minilm": "bert.encoder.layer", "gpt2-zinc": "transformer.h", "llama": "model.layers", "vit": "vit.layers"}


def places(model: Any, name: str) -> dict[str, str]:
    """Every second layer on disk, everything else in memory."""

    def below(path: str, module: Any) -> dict[str, str]:
        if path.rpartition(".")[0] == LAYERS[name]:
            return {path: "disk" if int(path.rpartition(".")[2]) % 2 else "cpu"}
        if not f"{LAYERS[name]}.".startswith(f"{path}.") and path:
            return {path: "cpu"}
        parts = [below(f"{path}.{child}".lstrip("."), part) for child, part in module.named_children()]
        return {place: device for part in parts for place, device in part.items()}

    return below("", model)


def from_pretrained(folder: Path, name: str, device_map: Any) -> Any:
    kind = getattr(transformers, BASE[name])
    return kind.from_pretrained(folder, device_map=device_map, offload_folder=folder / "offloaded")


def sharded(folder: Path, name: str, device_map: Any) -> Any:
    kind = getattr(transformers, BASE[name])
    kind.from_pretrained(folder).save_pretrained(folder / "shards", max_shard_size="200KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    return from_pretrained(folder / "shards", name, device_map)


def dispatched(folder: Path, name: str, device_map: Any) -> Any:
    with init_empty_weights():
        model = getattr(transformers, BASE[name]).from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    return load_checkpoint_and_dispatch(
        model, str(folder / "model.safetensors"), device_map=device_map, offload_folder=folder / "offloaded"
    )


def with_buffers(folder: Path, name: str, device_map: Any) -> Any:
    kind = getattr(transformers, BASE[name])
    folders = {"offload_folder": folder / "offloaded", "offload_buffers": True}
    return kind.from_pretrained(folder, device_map=device_map, **folders)


WAYS: dict[str, Callable[[Path, str, Any], Any]] = {
    "from_pretrained": from_pretrained,
    "shards": sharded,
    "load_checkpoint_and_dispatch": dispatched,
    "offload_buffers": with_buffers,
}


# Transformers saves ViT under the names of its older modules, which Accelerate by itself does not know.
CASES = [(name, way) for name in BASE for way in WAYS if (name, way) != ("vit", "load_checkpoint_and_dispatch")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_layers_on_disk_keep_their_polynomials(
    name: str, way: str, pretrained: Any, polynomial: Any, batch: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)  # of a head that no checkpoint has
    model, inputs = polynomial(pretrained(name, BASE[name])), batch(name)
    device_map = places(model, name)
    assert {"cpu", "disk"} == set(device_map.values())
    model.save_pretrained(tmp_path)
    loaded = WAYS[way](tmp_path, name, device_map).eval()
    devices = {path: {tensor.device.type for tensor in layer.parameters()} for path, layer in patched_layers(loaded)}
    assert {"meta"} in devices.values()  # some are on disk
    with torch.no_grad():
        expected = model(**inputs)[0]
        # A product depends, in its last bits, on where in memory the weights lie.
        difference = (loaded(**inputs)[0] - expected).abs().max() / expected.abs().max()
        assert difference < 1e-5
        loaded(**inputs)  # loads them again
        with hp.softmax_attention(model):
            assert not torch.allclose(model(**inputs)[0], expected, rtol=0.01)


def test_an_offloaded_model_is_saved_as_it_was(pretrained: Any, polynomial: Any, tmp_path: Path) -> None:
    model = polynomial(pretrained("llama", "AutoModelForCausalLM"))
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, "llama", places(model, "llama"))
    loaded.init_weights()
    loaded.save_pretrained(tmp_path / "again")
    again, saved = load_file(tmp_path / "again/model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_an_earlier_version_saved_is_not_offloaded_to_disk_and_says_what_to_do(name: str, tmp_path: Path) -> None:
    kind = transformers.LlamaForCausalLM if name == "llama" else transformers.BertModel
    folder, first = Path(__file__).parent / "saved_by_0_1_0" / name, LAYERS.get(name, "encoder.layer")
    whole = kind.from_pretrained(folder)
    paths = {path.partition(f"{first}.")[0] for path, _ in patched_layers(whole)}
    assert len(paths) == 1
    device_map = {f"{first}.0": "cpu", f"{first}.1": "disk"}
    device_map |= {path: "cpu" for path, _ in whole.named_children() if not first.startswith(path)}
    for path, module in whole.named_modules():
        if path and first.startswith(f"{path}."):
            inside = [f"{path}.{child}" for child, _ in module.named_children()]
            device_map |= {child: "cpu" for child in inside if not first.startswith(child)}
    with pytest.raises(
        hp.CheckpointError, match=r"layer.*\.1.*saved by an earlier version.*into memory, and save it again"
    ):
        kind.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offloaded")
    whole.save_pretrained(tmp_path / "again")  # as the message says
    loaded = kind.from_pretrained(tmp_path / "again", device_map=device_map, offload_folder=tmp_path / "offloaded")
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        expected = whole.eval()(input_ids=ids)[0]
        assert (loaded.eval()(input_ids=ids)[0] - expected).abs().max() < 1e-5 * expected.abs().max()
