"""Adapters on base models whose weights Accelerate keeps elsewhere: compared, or refused by name; never guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_polyattn as hp

peft = pytest.importorskip("peft")
FILE = "polyattn.safetensors"
PLACES = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
PLACES |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(5)}


def on_disk(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map=PLACES, offload_folder=folder.parent / "offloaded")


def by_cpu_offload(folder: Path) -> Any:
    return cpu_offload(AutoModelForCausalLM.from_pretrained(folder), torch.device("cpu"))


def by_disk_offload(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return disk_offload(model, str(folder.parent / f"all of {folder.name}"), execution_device=torch.device("cpu"))


WAYS = {way.__name__: way for way in (on_disk, by_cpu_offload, by_disk_offload)}


def lora(**settings: Any) -> Any:
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False} | settings
    return peft.LoraConfig(**settings)


@pytest.fixture(scope="module")
def saved(pretrained: Any, batch: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`saved(what)`: the folder of a base model: calibrated, calibrated on other data, only patched, or softmax."""
    folder = tmp_path_factory.mktemp("offloaded")

    def save(what: str) -> Path:
        if (folder / what).exists():
            return folder / what
        model = pretrained("llama", "AutoModelForCausalLM")
        if what != "softmax":
            hp.patch_model(model, "poly6-l1")
        if what in ("own", "other"):
            hp.calibrate(model, [batch("llama", 4, 24 if what == "own" else 32)], progress=False)
        model.save_pretrained(folder / what)
        return folder / what

    return save


@pytest.fixture(scope="module")
def adapter(saved: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter that was made on the model "own"."""
    folder = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved("own")), lora()).save_pretrained(folder)
    return folder


REFUSALS = {
    ("on_disk", "softmax"): "cannot be given an adapter.*weights are offloaded, at 'model.layers.1.*Load it whole",
    ("on_disk", "patched"): "cannot be given an adapter.*weights are offloaded",
    ("on_disk", "other"): r"polynomials at \['layers.0.self_attn'.* are not those that the adapter was trained on",
    **{
        (way, what): "cannot be given an adapter.*weights are offloaded.*Load it whole"
        for way in ("by_cpu_offload", "by_disk_offload")
        for what in ("softmax", "patched", "own")  # PEFT's own weights would stay on meta there, without a word
    },
}


@pytest.mark.parametrize(("way", "what"), REFUSALS)
def test_an_adapter_is_refused_where_its_polynomials_cannot_be_given(
    way: str, what: str, saved: Any, adapter: Path, batch: Any
) -> None:
    base = WAYS[way](saved(what))
    with torch.no_grad():
        before = base(**batch("llama"))[0]
    with pytest.raises(hp.PatchError, match=REFUSALS[way, what]):
        peft.PeftModel.from_pretrained(base, adapter)
    assert hp.is_patched(base) == (what != "softmax")
    with torch.no_grad():
        assert torch.equal(base(**batch("llama"))[0], before)


def test_an_adapter_that_transformers_loads_is_compared_with_what_is_on_disk(
    saved: Any, batch: Any, tmp_path: Path
) -> None:
    base = on_disk(saved("own"))
    layers = lora(layers_to_transform=[0, 2])  # those in memory
    made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved("own")), layers)
    made.save_pretrained(tmp_path / "two")
    with torch.no_grad():
        expected, before = made.eval()(**batch("llama"))[0], base(**batch("llama"))[0]
        base.load_adapter(str(tmp_path / "two"))
        found = base(**batch("llama"))[0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-2 * expected.abs().max()
    with pytest.raises(hp.PatchError, match="are not those that the adapter was trained on"):
        on_disk(saved("other")).load_adapter(str(tmp_path / "two"))


def test_an_adapter_on_a_model_that_is_partly_on_disk_saves_all_polynomials(saved: Any, tmp_path: Path) -> None:
    model = peft.get_peft_model(on_disk(saved("own")), lora(layers_to_transform=[0, 2]))
    model.save_pretrained(tmp_path / "adapter")
    found, base = load_file(tmp_path / "adapter" / FILE), load_file(saved("own") / "model.safetensors")
    expected = {name.removeprefix("model."): tensor for name, tensor in base.items() if ".polyattn." in name}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(".1." in name for name in found)  # one that was on disk
