"""The monitor in a training loop: `Trainer` stops before broken weights are saved, and trackers get the scalars."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from monitored import attention, path
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from hf_polyattn import CheckpointError, DivergenceError, Monitor, MonitorCallback, is_patched

Batch = dict[str, Tensor]


class Tracked(TrainerCallback):
    """A tracker, as Trainer makes one of each name in `report_to`."""

    logs: list[dict[str, float]]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Tracked.logs = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        Tracked.logs.append(dict(logs))


class AtStep(TrainerCallback):
    """Does something to the model before or after the update of one step."""

    def __init__(self, event: str, step: int, action: Callable[[Any], None]) -> None:
        def act(args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == step - 1:  # the step is counted after its update
                action(model)

        setattr(self, event, act)


class Shown(TrainerCallback):
    """Sees the logs where the progress bar does."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


@pytest.fixture
def trainer(llama: Any, inputs: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tracked", Tracked)
    data = [{name: value[i] for name, value in inputs.items()} for i in range(3)] * 8

    def make(*callbacks: TrainerCallback) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=5,
            per_device_train_batch_size=3,
            learning_rate=1e-4,
            logging_steps=1,
            save_steps=1,
            report_to=["tracked"],
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(llama, arguments, train_dataset=data, callbacks=list(callbacks))

    return make


def finite_checkpoints(folder: Path) -> list[str]:
    """Returns the checkpoints in a folder; each loads as a polynomial model whose loss can be computed."""
    found = sorted(file.name for file in folder.glob("checkpoint-*"))
    for name in found:
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        assert is_patched(model)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    return found


def test_trainer_gives_the_scalars_to_its_trackers(llama: Any, trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    shown = Shown()
    with Monitor(llama, every=1) as monitor:
        run = trainer(MonitorCallback(monitor), shown)
        run.train()
        assert monitor.steps == 5
    name = f"polyattn/outside/{path(1)}"
    training = [logs for logs in Tracked.logs if "loss" in logs]
    assert len(training) == 5
    assert all(0.0 < logs[name] < 1.0 for logs in training)
    assert sum("train_runtime" in logs and name not in logs for logs in Tracked.logs) == 1
    assert not any(key.startswith("polyattn") for logs in shown.logs for key in logs)
    saved = json.loads((tmp_path / "checkpoint-5/trainer_state.json").read_text())
    assert [entry[name] for entry in saved["log_history"]] == [logs[name] for logs in training]


def spoil_output(model: Any) -> None:
    layer = attention(model, 1).polyattn
    handle = layer.register_forward_hook(lambda module, arguments, output: (handle.remove(), output * torch.nan)[1])
    layer._forward_hooks.move_to_end(handle.id, last=False)  # as if the layer computed it


def spoil_coefficients(model: Any) -> None:
    with torch.no_grad():
        attention(model, 1).polyattn.coefficients[0, 0] = torch.nan


def spoil_mlp(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("event", "action", "named"),
    [
        ("on_step_begin", spoil_output, f"after 2 updates, the output of '{path(1)}'"),
        ("on_step_begin", spoil_coefficients, f"after 2 updates, the output of '{path(1)}'"),
        ("on_optimizer_step", spoil_mlp, "after 3 updates, the weight 'model.layers.1.mlp.up_proj.weight'"),
    ],
    ids=["forward", "coefficients", "update"],
)
def test_trainer_stops_before_broken_weights_are_saved(
    llama: Any,
    trainer: Callable[..., Trainer],
    tmp_path: Path,
    event: str,
    action: Callable[[Any], None],
    named: str,
) -> None:
    with Monitor(llama) as monitor, pytest.raises(DivergenceError, match=named):
        trainer(MonitorCallback(monitor), AtStep(event, 3, action)).train()
    assert finite_checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_trainer_without_the_monitor_saves_broken_weights(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer(AtStep("on_step_begin", 3, spoil_output)).train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 5
    with pytest.raises(CheckpointError, match="has NaN or infinite values"):
        finite_checkpoints(tmp_path)


# ---------------------------------------------------------------- accelerate


class JsonLines(GeneralTracker):
    """An accelerate tracker that writes a line a step."""

    name, requires_logging_directory = "json-lines", False

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    @property
    def tracker(self) -> Path:
        return self.file

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    @on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        with self.file.open("a") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")


def test_scalars_reach_an_accelerate_tracker(llama: Any, inputs: Batch, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with=JsonLines(tmp_path / "log.jsonl"))
    accelerator.init_trackers("test")
    model, optimizer = accelerator.prepare(llama, torch.optim.AdamW(llama.parameters(), lr=1e-3))
    with Monitor(model, every=1) as monitor:
        for step in range(3):
            accelerator.backward(model(**inputs).loss)
            monitor.check()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
            accelerator.log(monitor.scalars(), step=step)
    accelerator.end_training()
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    name = f"polyattn/output_rms/{path(0)}"
    assert [entry["step"] for entry in logged] == [0, 1, 2]
    assert len({entry[name] for entry in logged}) == 3  # of three different models
