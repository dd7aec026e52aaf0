"""What a config freezes or does not use asks for no gradient, whoever loaded, copied, wrapped or unfroze the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import hf_polyattn as hp
from hf_polyattn.patching.patched import patched_layers

CONFIGS = {
    "uncalibrated power": (hp.PolyAttentionConfig("poly3^16-l1"), {"delta"}),
    "uncalibrated": (hp.PolyAttentionConfig("poly3"), {"delta"}),
    "frozen": (hp.PolyAttentionConfig("poly3", learnable=False, interval=True, clamp=True, key_shift=True), set()),
    "without key shift": (hp.PolyAttentionConfig("poly4-l1", interval=True, clamp=True), {"delta", "center"}),
    "calibrated": (
        hp.PolyAttentionConfig("poly4-l1", interval=True, clamp=True, key_shift=True),
        {"delta", "center", "key_shift"},
    ),
}


def from_pretrained(model: Any, folder: Path, **kwargs: Any) -> Any:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def with_peft(model: Any, folder: Path, times: int = 1) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["polyattn"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    if times == 2:
        wrapped.add_adapter("second", config)
        wrapped.set_adapter("second")
        with wrapped.disable_adapter():
            pass
    return wrapped


def peft_reloaded(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    base = copy.deepcopy(model)
    with_peft(model, folder).save_pretrained(folder)
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def unfrozen(model: Any, folder: Path) -> Any:
    return model.requires_grad_(False).requires_grad_(True).train()


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "patched": lambda model, folder: model,
    "from_pretrained": from_pretrained,
    "device_map": lambda model, folder: from_pretrained(model, folder, device_map="cpu"),
    "bfloat16": lambda model, folder: from_pretrained(model, folder, dtype=torch.bfloat16),
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "modules_to_save": with_peft,
    "modules_to_save twice": lambda model, folder: with_peft(model, folder, times=2),
    "modules_to_save reloaded": peft_reloaded,
    "requires_grad_(True)": unfrozen,
    "requires_grad_(True) in training": lambda model, folder: model.train().requires_grad_(True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CONFIGS)
def test_only_what_gets_a_gradient_asks_for_one(
    case: str, way: str, pretrained: Any, polynomial: Any, batch: Any, tmp_path: Path
) -> None:
    config, expected = CONFIGS[case]
    model, inputs = polynomial(pretrained("gpt2-zinc", "AutoModelForCausalLM"), config), batch("gpt2-zinc")
    model = WAYS[way](model, tmp_path)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    layers = patched_layers(model)
    assert len(layers) == 4
    for path, layer in layers:
        asks = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
        gets = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
        assert asks == gets == expected, path


def test_a_hand_written_config_freezes_too(pretrained: Any, tmp_path: Path) -> None:
    pretrained("gpt2-zinc", "AutoModelForCausalLM").save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    for learnable in (True, False):
        config.polyattn_config = hp.PolyAttentionConfig("poly3", learnable=learnable).to_dict()
        for _, layer in patched_layers(AutoModelForCausalLM.from_pretrained(tmp_path, config=copy.deepcopy(config))):
            asks = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
            assert asks == ({"delta"} if learnable else set())


def test_calibration_leaves_frozen_what_somebody_froze(pretrained: Any, batch: Any) -> None:
    for frozen in (True, False):
        model = hp.patch_model(pretrained("gpt2-zinc"), "poly3").requires_grad_(not frozen)
        hp.calibrate(model, [batch("gpt2-zinc", 4)], progress=False)
        asks = {name for _, layer in patched_layers(model) for name, p in layer.named_parameters() if p.requires_grad}
        assert asks == (set() if frozen else {"delta", "center", "key_shift"})


@pytest.mark.parametrize("case", CONFIGS)
def test_a_reloaded_model_takes_a_second_step_under_ddp(
    case: str, pretrained: Any, batch: Any, polynomial: Any, tmp_path: Path
) -> None:
    config, expected = CONFIGS[case]
    model = from_pretrained(polynomial(pretrained("gpt2-zinc", "AutoModelForCausalLM"), config), tmp_path)
    inputs = batch("gpt2-zinc")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        for _ in range(2):
            wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    finally:
        dist.destroy_process_group()
    got = {name for _, layer in patched_layers(wrapped) for name, p in layer.named_parameters() if p.grad is not None}
    assert got == expected


@pytest.mark.parametrize("spec", ["poly3", "poly3~1"])
def test_what_calibration_sets_gets_no_gradient_from_anybody(spec: str, pretrained: Any, batch: Any) -> None:
    inputs = batch("llama")
    model = hp.patch_model(pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=1), spec).train()
    hp.calibrate(model, [inputs], row_shift="moments", progress=False)
    (child,) = [child for _, child in patched_layers(model)]
    fixed = [name for name, p in child.named_parameters() if not p.requires_grad]
    assert {"coefficients", "directions", "radius", "moments.means", "moments.scales", "moments.lengths"} <= {*fixed}
    before = {name: p.detach().clone() for name, p in child.named_parameters()}
    for parameter in child.parameters():
        parameter.requires_grad_(True)  # after `train`, which would take it back
    optimizer = torch.optim.AdamW(child.parameters(), lr=1e-2, weight_decay=0.0)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    # center and radius of a refinement's interval are `PolyAttention.forward`'s to fix
    looked_at = [name for name in fixed if not name.startswith("refinements") or "coefficients" in name]
    assert [name for name in looked_at if not torch.equal(child.get_parameter(name), before[name])] == []
    assert not torch.equal(child.delta, before["delta"])
