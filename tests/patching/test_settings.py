"""A state dict carries what its polynomials mean: whoever loads it gets the model that was saved, or an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from with_heads import output

import hf_polyattn as hp
from hf_polyattn.patching import settings
from hf_polyattn.patching.core import PolyAttention
from hf_polyattn.patching.patched import patched_layers
from hf_polyattn.spec import MAX_SQUARES

CALIBRATED = {"interval": True, "clamp": True, "key_shift": True}


@pytest.fixture(scope="module")
def calibrated(pretrained: Any, batch: Any) -> Callable[[str], Any]:
    """`calibrated(spec)`: the Llama, patched and calibrated."""

    def make(spec: str) -> Any:
        model = hp.patch_model(pretrained("llama", "AutoModelForCausalLM"), spec)
        hp.calibrate(model, [batch("llama", 4)], row_shift="moments", squares=8, progress=False)
        return model

    return make


def load_state_dict(source: Any, target: Any, folder: Path) -> Any:
    torch.save(source.state_dict(), folder / "state.pt")
    assert not target.load_state_dict(torch.load(folder / "state.pt")).missing_keys
    return target


def assigned(source: Any, target: Any, folder: Path) -> Any:
    target.load_state_dict(source.state_dict(), assign=True)
    return target


def in_bfloat16(source: Any, target: Any, folder: Path) -> Any:
    """As tools do that cast whatever they find; polynomials stay as they are."""
    state = {key: x.bfloat16() if key.endswith("settings") else x for key, x in source.state_dict().items()}
    target.load_state_dict(state)
    return target


def safetensors_file(source: Any, target: Any, folder: Path) -> Any:
    from safetensors.torch import load_model, save_model

    save_model(source, str(folder / "model.safetensors"))
    load_model(target, folder / "model.safetensors")
    return target


def accelerate_state(source: Any, target: Any, folder: Path) -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(source)
    accelerator.save_state(str(folder))
    accelerator.free_memory(prepared)
    target = accelerator.prepare(target)
    accelerator.load_state(str(folder))
    accelerator.free_memory(target)
    return target


def distributed_checkpoint(source: Any, target: Any, folder: Path) -> Any:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    checkpoint.save({"model": get_model_state_dict(source)}, checkpoint_id=folder)
    state = {"model": get_model_state_dict(target)}
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(target, state["model"])
    return target


def lightning_module(source: Any, target: Any, folder: Path) -> Any:
    """A module around the model, whose checkpoint has a state dict under a key."""
    modules = []
    for model in (source, target):
        modules.append(nn.Module())
        modules[-1].model = model
    torch.save({"state_dict": modules[0].state_dict(), "epoch": 1}, folder / "last.ckpt")
    modules[1].load_state_dict(torch.load(folder / "last.ckpt")["state_dict"])
    return target


def data_parallel(source: Any, target: Any, folder: Path) -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = [nn.parallel.DistributedDataParallel(model) for model in (source, target)]
        wrapped[1].load_state_dict(wrapped[0].state_dict())
    finally:
        dist.destroy_process_group()
    return target


def modules_to_save(source: Any, target: Any, folder: Path) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    adapter = get_peft_model(source, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["polyattn"]))
    adapter.save_pretrained(folder)
    return PeftModel.from_pretrained(target, folder)


WAYS = {
    way.__name__: way
    for way in (
        load_state_dict, assigned, in_bfloat16, safetensors_file, accelerate_state, distributed_checkpoint,
        lightning_module, data_parallel, modules_to_save,
    )
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_state_restores_the_model_that_it_is_of(
    way: str, calibrated: Any, pretrained: Any, batch: Any, tmp_path: Path
) -> None:
    inputs = batch("llama")
    source = calibrated("poly6-l1")
    expected = output(source, inputs)
    config: Any = "poly6-l1"
    if way == "distributed_checkpoint":  # which loads in place what is there already
        config = hp.PolyAttentionConfig("poly6-l1", row_shift="moments", squares=8)
    target = hp.patch_model(pretrained("llama", "AutoModelForCausalLM"), config)
    assert not torch.allclose(output(target, inputs), expected, rtol=0.01)
    target = WAYS[way](source, target, tmp_path).eval()
    assert torch.equal(output(target, inputs), expected)
    for _, layer in patched_layers(target):
        assert layer.config == patched_layers(source)[0][1].config
        assert (layer.config.interval, layer.config.row_shift) == (True, "moments")
    if way != "modules_to_save":  # whose adapter is no model
        target.save_pretrained(tmp_path / "whole")
        assert torch.equal(output(type(target).from_pretrained(tmp_path / "whole").eval(), inputs), expected)


@pytest.mark.parametrize(
    ("saved", "other"), [("poly3-l1", "poly3"), ("poly3", "poly3^8-l1"), ("poly3^16-l1", "taylor3-mean")]
)
def test_another_normalizer_and_power_come_with_the_tensors(
    saved: str, other: str, calibrated: Any, pretrained: Any, batch: Any, tmp_path: Path
) -> None:
    inputs, source = batch("llama"), calibrated(saved)
    target = hp.patch_model(pretrained("llama", "AutoModelForCausalLM"), other)
    target.load_state_dict(source.state_dict())
    assert torch.equal(output(target, inputs), output(source, inputs))
    assert str(patched_layers(target)[0][1].config.spec) == saved
    target.save_pretrained(tmp_path)
    again = type(target).from_pretrained(tmp_path).eval()
    assert torch.equal(output(again, inputs), output(source, inputs))


def test_calibrated_centers_train_after_loading(calibrated: Any, pretrained: Any) -> None:
    source, target = calibrated("poly3"), hp.patch_model(pretrained("llama", "AutoModelForCausalLM"), "poly3")
    frozen = hp.patch_model(pretrained("llama", "AutoModelForCausalLM"), "poly3").requires_grad_(False)
    for model, trains in ((target, True), (frozen, False)):
        model.load_state_dict(source.state_dict())
        for _, layer in patched_layers(model):
            assert layer.delta.requires_grad is layer.center.requires_grad is layer.key_shift.requires_grad is trains


def layer_state(config: hp.PolyAttentionConfig) -> dict[str, torch.Tensor]:
    return PolyAttention(config, heads=2, head_dim=4).state_dict()


def text(**changes: Any) -> torch.Tensor:
    content = json.loads(bytes(settings.encoded(hp.PolyAttentionConfig("poly3")).tolist()).rstrip(b"\0"))
    content = {key: value for key, value in {**content, **changes}.items() if value is not ...}
    return torch.tensor(list(json.dumps(content).encode().ljust(settings.BYTES, b"\0")), dtype=torch.uint8)


BROKEN = {
    "unknown": (
        lambda: text(row_moments=True),
        r"settings has unknown fields \['row_moments'\]; known are",
    ),
    "future": (lambda: text(version=99), "settings has version 99; this hf_polyattn reads 2.*pip install --upgrade"),
    "lacking": (lambda: text(clamp=...), r"settings lacks \['clamp'\]"),
    "wrong value": (lambda: text(interval=1), "settings: interval must be True or False, got 1"),
    "wrong spec": (lambda: text(spec="poly99"), "settings: spec 'poly99': degree 99"),
    "noise": (lambda: torch.arange(256).to(torch.uint8), "settings holds no JSON"),
    "a list": (lambda: torch.tensor(list(b"[1]".ljust(256, b"\0")), dtype=torch.uint8), "settings holds a list"),
    "short": (lambda: torch.zeros(7, dtype=torch.uint8), r"torch.uint8 with shape \(7,\); settings are uint8 \(256,\)"),
    "averaged": (lambda: text() + 0.5, "settings is torch.float32"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_settings_that_cannot_be_read_are_refused(case: str) -> None:
    make, message = BROKEN[case]
    layer = PolyAttention(hp.PolyAttentionConfig("poly3"), heads=2, head_dim=4)
    state = layer.state_dict() | {"settings": make()}
    with pytest.raises(hp.CheckpointError, match=message):
        layer.load_state_dict(state)
    assert layer.config == hp.PolyAttentionConfig("poly3")
    layer.load_state_dict(layer.state_dict() | {"settings": text()})  # the control


def test_a_polynomial_of_another_degree_is_refused_by_name() -> None:
    layer = PolyAttention(hp.PolyAttentionConfig("poly3"), heads=2, head_dim=4)
    with pytest.raises(hp.CheckpointError, match=r"of the polynomial poly6-l1, but .* has poly3.*Patch .* 'poly6-l1'"):
        layer.load_state_dict(layer_state(hp.PolyAttentionConfig("poly6-l1")))


def test_every_field_that_the_forward_pass_reads_is_in_the_settings() -> None:
    assert settings.FIELDS == ("spec", "interval", "clamp", "key_shift", "row_shift", "squares", "lengths")
    longest = hp.PolyAttentionConfig(
        "taylor8^32~2-mean", interval=True, clamp=True, row_shift="moments", squares=MAX_SQUARES, lengths=(1, 10**9)
    )
    assert settings.encoded(longest).shape == (settings.BYTES,)
    assert settings.restored(hp.PolyAttentionConfig("taylor8"), settings.encoded(longest), "") == longest


def test_settings_follow_the_config(pretrained: Any, batch: Any) -> None:
    model = hp.patch_model(pretrained("gpt2-zinc", "AutoModelForCausalLM"), "poly3")
    hp.calibrate(model, [batch("gpt2-zinc", 4)], spec="poly4-l1", key_shift=False, progress=False)
    for _, layer in patched_layers(model):
        assert torch.equal(layer.settings, settings.encoded(layer.config))
        assert settings.decoded(layer.settings, "")["spec"] == "poly4-l1"
        assert settings.decoded(layer.settings, "") | {"spec": 0} == {
            "spec": 0,
            **CALIBRATED,
            "key_shift": False,
            "row_shift": "none",
            "squares": 0,
            "lengths": [1, 24],
        }
