"""Trainings go on from checkpoints of earlier versions, whose optimizers know nothing of δ, or say what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_polyattn as hp
from hf_polyattn.patching.patched import patched_layers

NEW = re.compile(r"\.polyattn\.(.*\.)?(delta|directions)$")
STARTS_ANEW = "for polynomials it starts anew, everything else is as it was"


@pytest.fixture
def calibrated(pretrained: Any, batch: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = hp.patch_model(pretrained("gpt2-zinc", "AutoModelForCausalLM", num_hidden_layers=1), "poly4-l1")
        hp.calibrate(model, [batch("gpt2-zinc", 4)], row_shift="linear", progress=False)
        return model

    return make


def trainer(model: Any, rows: Any, folder: Path, steps: int) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, learning_rate=1e-4, per_device_train_batch_size=2, use_cpu=True,
        disable_tqdm=True, report_to=[], lr_scheduler_type="constant",
    )  # fmt: skip
    examples = [{"input_ids": ids, "labels": ids} for ids in rows]
    return Trainer(model=model, args=arguments, train_dataset=examples)


def make_earlier(folder: Path, *, settings: bool) -> None:
    """Rewrites a checkpoint as versions before δ did, with an optimizer that remembers gradients of coefficients.

    Those of an l1 polynomial were hundreds of times those of the other weights.
    """
    tensors = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not NEW.search(name) and (settings or "settings" not in name)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    if not settings:
        config = json.loads((folder / "config.json").read_text())
        config["polyattn_config"]["format_version"] = 1
        for name in ("row_shift", "squares", "lengths"):
            del config["polyattn_config"][name]
        (folder / "config.json").write_text(json.dumps(config))


def deltas(model: Any) -> list[torch.Tensor]:
    return [layer.delta for _, layer in patched_layers(model)]


def of_delta(optimizer: Any, model: Any) -> dict[str, torch.Tensor]:
    state = getattr(optimizer, "optimizer", optimizer).state
    return state[deltas(model)[0]]


def test_trainer_goes_on_from_before_delta(calibrated: Any, batch: Any, tmp_path: Path) -> None:
    rows, model = batch("gpt2-zinc", 4)["input_ids"], calibrated()
    first = trainer(model, rows, tmp_path, 2)
    first.train()
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(folder, tmp_path / "now")
    make_earlier(folder, settings=True)
    states = torch.load(folder / "optimizer.pt")
    names = [next(name for name, p in model.named_parameters() if p is parameter)
             for group in first.optimizer.param_groups for parameter in group["params"]]  # fmt: skip
    for number, name in enumerate(names):
        if name.endswith("delta"):
            states["state"][number] = {"step": torch.tensor(2.0), "exp_avg": torch.full_like(deltas(model)[0], 600.0),
                                       "exp_avg_sq": torch.full_like(deltas(model)[0], 360_000.0)}  # fmt: skip
    torch.save(states, folder / "optimizer.pt")

    resumed = calibrated()
    again = trainer(resumed, rows, tmp_path, 3)
    with pytest.warns(UserWarning, match=STARTS_ANEW):
        again.train(resume_from_checkpoint=str(folder))
    found = of_delta(again.optimizer, resumed)
    assert float(found["step"]) == 1.0
    assert found["exp_avg"].abs().max() < 1.0
    weight = next(parameter for name, parameter in resumed.named_parameters() if name.endswith("c_proj.weight"))
    assert float(again.optimizer.optimizer.state[weight]["step"]) == 3.0
    assert 0 < deltas(resumed)[0].abs().max() <= 1.1e-4  # one step of its own, of the size of the learning rate

    control = trainer(calibrated(), rows, tmp_path, 3)
    control.train(resume_from_checkpoint=str(tmp_path / "now"))
    assert float(of_delta(control.optimizer, control.model)["step"]) == 3.0


def test_accelerate_goes_on_from_before_delta(calibrated: Any, batch: Any, tmp_path: Path) -> None:
    ids = batch("gpt2-zinc", 4)["input_ids"]

    def prepared() -> tuple[Any, Any, Any]:
        accelerator = Accelerator(cpu=True)
        model = calibrated()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return accelerator, *accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-4))

    def step(model: Any, optimizer: Any) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    accelerator, model, optimizer = prepared()
    step(model, optimizer)
    accelerator.save_state(str(tmp_path))
    assert deltas(model)[0].abs().max() > 0
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not NEW.search(n)}, tmp_path / "model.safetensors")

    accelerator, model, optimizer = prepared()
    accelerator.load_state(str(tmp_path))
    with pytest.warns(UserWarning, match=STARTS_ANEW):
        step(model, optimizer)
    assert float(of_delta(optimizer, model)["step"]) == 1.0


def test_a_state_dict_without_settings_is_refused_and_says_what_to_do(
    calibrated: Any, batch: Any, tmp_path: Path
) -> None:
    rows, model = batch("gpt2-zinc", 4)["input_ids"], calibrated()
    trainer(model, rows, tmp_path, 2).train()
    folder = tmp_path / "checkpoint-2"
    make_earlier(folder, settings=False)
    fresh = calibrated()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items() if "polyattn" in name}
    with pytest.raises(hp.CheckpointError, match=r"come without settings.*from_pretrained, and go on from that model"):
        trainer(fresh, rows, tmp_path, 3).train(resume_from_checkpoint=str(folder))
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in before.items())
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # as the message says
    trainer(loaded, rows, tmp_path / "on", 1).train()
    assert deltas(loaded)[0].abs().max() > 0
