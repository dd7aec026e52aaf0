"""The way of every recipe: a softmax checkpoint is patched, calibrated, finetuned, saved and reloaded, and measured
after each stage, for one or more polynomials.

A recipe brings a `Task`: what its model, its data and its quality are.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import hf_polyattn
from hf_polyattn import InputError
from hf_polyattn.adaptation.distillation import LEARNING_RATES
from hf_polyattn.tables import format_table

from .plotting import plot_stages
from .runs import describe_device, peak_memory_mib, read_arguments, single_process, versions, write_beside

STAGES = {
    "softmax": "the checkpoint as it was published",
    "patched": "softmax swapped for the polynomial, nothing else",
    "calibrated": "each head's polynomial computed in closed form, no training of its own",
    "finetuned": "trained to match the softmax model, for as many steps as the column says (0: not needed)",
    "reloaded": "saved, and loaded with plain from_pretrained in a new process",
}


@dataclasses.dataclass
class StageArguments:
    """What every recipe can be told."""

    specs: list[str] = dataclasses.field(
        default_factory=lambda: ["poly3", "poly6-l1", "poly3^16-l1"],
        metadata={"help": "polynomials to convert the model to, each from the softmax checkpoint"},
    )
    calibrate_only: list[str] = dataclasses.field(
        default_factory=lambda: ["poly3^16-l1"], metadata={"help": "those of them that are not finetuned"}
    )
    adapt: Literal["calibrate", "none"] = dataclasses.field(
        default="calibrate", metadata={"help": "how the polynomials start: in closed form, or as bare monomials"}
    )
    align_steps: int = dataclasses.field(
        default=0, metadata={"help": "steps, of those below, of partition alignment before polynomials without l1"}
    )
    layer_steps: int = dataclasses.field(
        default=0, metadata={"help": "steps in which each calibrated polynomial is matched to softmax by itself"}
    )
    calibration_batches: int = dataclasses.field(default=8, metadata={"help": "batches to calibrate on"})
    batch_size: int = dataclasses.field(default=32, metadata={"help": "examples in a batch, for each process"})
    steps: int = dataclasses.field(default=100, metadata={"help": "finetuning steps"})
    learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "peak, of the model's weights; default 1e-4, for l1 specs 1e-5"}
    )
    coefficient_learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "peak, of the polynomials; default 2e-3, for l1 specs 1e-4"}
    )
    bf16: bool = dataclasses.field(default=False, metadata={"help": "finetune in bfloat16; measured is in float32"})
    latency_repeats: int = dataclasses.field(default=11, metadata={"help": "timed runs of each model at each stage"})
    seed: int = dataclasses.field(default=0, metadata={"help": "of the data's split and order"})
    output_dir: str = dataclasses.field(
        default="outputs/demo", metadata={"help": "for results.json, stages.png and one checkpoint for each spec"}
    )
    checkpoint: str | None = dataclasses.field(
        default=None, metadata={"help": "only measure this saved polynomial checkpoint, and print it as JSON"}
    )
    predictions: str | None = dataclasses.field(
        default=None, metadata={"help": "with --checkpoint: save its predictions here (safetensors)"}
    )

    def __post_init__(self) -> None:
        if self.align_steps > max(0, self.steps):
            raise InputError(f"--align_steps {self.align_steps} are part of --steps, now {self.steps}; raise these")
        if self.adapt == "none" and (self.align_steps or self.layer_steps):
            raise InputError("--align_steps and --layer_steps go with calibration; they do not go with --adapt none")


class Task(Protocol):
    """What a recipe does: its model, its data and how its quality is measured.

    Attributes:
        name: of the softmax checkpoint, in the results.
        source: its path or Hub name.
        data: what the data is, as JSON types, for the results.
        columns: name and one-sentence meaning of each measure of quality; the first is the one that is plotted.
        train_loader: batches to calibrate and finetune on.
        sample: a small batch of held-out data, to measure the latency with.
    """

    name: str
    source: str
    data: dict[str, Any]
    columns: dict[str, str]
    train_loader: DataLoader[Any]
    sample: Mapping[str, Tensor]

    def load_model(self, source: str) -> PreTrainedModel: ...

    def save(self, model: PreTrainedModel, folder: Path) -> None: ...

    def predict(self, model: PreTrainedModel) -> Tensor:
        """Returns what the model says about the held-out data."""
        ...

    def score(self, predictions: Tensor, softmax_predictions: Tensor) -> dict[str, float]:
        """Returns the measures of quality that `columns` names."""
        ...


def main(argument_types: tuple[type, ...], make_task: Callable[..., Task]) -> None:
    """Runs a recipe: reads its arguments, makes its task and brings each polynomial through the stages.

    Args:
        argument_types: dataclasses of arguments, `StageArguments` first.
        make_task: called with one instance of each.
    """
    try:
        arguments = read_arguments(argument_types)
        stage_arguments = arguments[0]
        set_seed(stage_arguments.seed)
        accelerator = Accelerator(
            mixed_precision="bf16" if stage_arguments.bf16 else None,  # None: as the environment says
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        if not accelerator.is_main_process or stage_arguments.checkpoint:
            transformers_logging.disable_progress_bar()
        stages = Stages(make_task(*arguments), stage_arguments, accelerator)
        if stage_arguments.checkpoint is not None:
            stages.measure_checkpoint()
            return
        started = time.perf_counter()
        results = {"specs": {spec: stages.convert(spec) for spec in stage_arguments.specs}}
    except hf_polyattn.PolyAttnError as error:
        sys.exit(f"error: {error}")
    if accelerator.is_main_process:
        results |= {
            "model": stages.task.name,
            "data": stages.task.data,
            "arguments": {k: v for part in arguments for k, v in dataclasses.asdict(part).items()},
            "seed": stage_arguments.seed,
            "device": describe_device(accelerator),
            "versions": versions(),
            "wall_seconds": round(time.perf_counter() - started, 1),
            "peak_memory_mib": peak_memory_mib(),
        }
        output = Path(stage_arguments.output_dir)
        write_beside(output / "results.json", lambda path: path.write_text(json.dumps(results, indent=2) + "\n"))
        quality = next(iter(stages.task.columns))
        write_beside(output / "stages.png", lambda path: plot_stages(results["specs"], quality, path))
        print(render(results, stages.task.columns))
        print(f"\nWritten to {output}: results.json, stages.png and the checkpoints {', '.join(results['specs'])}.")
    accelerator.end_training()


class Stages:
    """Brings a task's softmax checkpoint through the stages, for one polynomial after another."""

    def __init__(self, task: Task, arguments: StageArguments, accelerator: Accelerator) -> None:
        self.task, self.arguments, self.accelerator = task, arguments, accelerator
        self.softmax = task.load_model(task.source).to(accelerator.device).eval()
        self.softmax_predictions = task.predict(self.softmax)
        self.softmax_measures = self.measure(self.softmax)

    def convert(self, spec: str) -> dict[str, Any]:
        """Returns the measures of every stage of one polynomial; its checkpoint is written in between."""
        task, arguments, accelerator = self.task, self.arguments, self.accelerator
        stages: dict[str, Any] = {"softmax": self.softmax_measures}
        model = task.load_model(task.source).to(accelerator.device).eval()
        hf_polyattn.patch_model(model, spec)
        stages["patched"] = self.measure(model)

        steps = 0 if spec in arguments.calibrate_only else arguments.steps
        given = (arguments.learning_rate, arguments.coefficient_learning_rate)
        defaults = LEARNING_RATES["l1" if spec.endswith("l1") else "fixed"]
        rates = [default if rate is None else rate for rate, default in zip(given, defaults, strict=True)]
        aligned = 0 if steps == 0 or spec.endswith("l1") else arguments.align_steps
        seconds: dict[str, float] = {}
        progress = accelerator.is_main_process
        started = time.perf_counter()
        if aligned:
            with accelerator.autocast():
                hf_polyattn.align(model, task.train_loader, steps=aligned, lr=rates[0], progress=progress)
        calibration = None
        if arguments.adapt == "calibrate":
            calibration = hf_polyattn.calibrate(
                model, task.train_loader, max_batches=arguments.calibration_batches, progress=progress
            )
            seconds["calibrate"] = time.perf_counter() - started
        stages["calibrated"] = self.measure(model)

        distillation = None
        if steps > aligned:
            started = time.perf_counter()
            distillation = hf_polyattn.distill(
                model,
                accelerator.prepare(task.train_loader),
                steps=steps - aligned,
                layer_steps=arguments.layer_steps,
                lr=rates[0],
                coefficient_lr=rates[1],
                teacher=self.softmax,
                accelerator=accelerator,
                progress=progress,
            )
            seconds["finetune"] = time.perf_counter() - started
            model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            accelerator.free_memory()
        stages["finetuned"] = {**(self.measure(model) if steps else stages["calibrated"]), "steps": steps}

        result: dict[str, Any] = {"stages": stages}
        if accelerator.is_main_process:
            folder = Path(arguments.output_dir) / spec
            write_beside(folder, lambda path: task.save(model, path))
            stages["reloaded"] = self.reload(folder, task.predict(model))
            result |= {
                "checkpoint": str(folder),
                "reload_is_equal": True,
                "seconds": {name: round(value, 1) for name, value in seconds.items()},
                "calibration": None if calibration is None else calibration.to_dict(),
                "distillation": None if distillation is None else distillation.to_dict(),
            }
        accelerator.wait_for_everyone()
        return result

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Returns a model's quality and its latency beside softmax's; nothing on processes other than the main."""
        if not self.accelerator.is_main_process:
            return {}
        scores = self.task.score(self.task.predict(model), self.softmax_predictions)
        sample = {name: tensor.to(self.accelerator.device) for name, tensor in self.task.sample.items()}
        latency, softmax_latency = interleaved_latency([model, self.softmax], sample, self.arguments.latency_repeats)
        return {**scores, "latency_ms": latency, "softmax_latency_ms": softmax_latency}

    def reload(self, folder: Path, expected: Tensor) -> dict[str, float]:
        """Returns the measures of a saved checkpoint, taken by this recipe in a new process.

        Raises:
            RuntimeError: its predictions are not, bit for bit, those of the model that was saved.
        """
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "predictions.safetensors"
            command = [sys.executable, *sys.argv, "--checkpoint", str(folder), "--predictions", str(file)]
            printed = subprocess.run(command, env=single_process(), stdout=subprocess.PIPE, check=True).stdout
            found = load_file(file)["predictions"]
        if not torch.equal(found, expected):
            raise RuntimeError(
                f"{folder} predicts something else in a new process than the model that was saved there: "
                f"the largest difference is {(found - expected).abs().max():.3g}"
            )
        return json.loads(printed)

    def measure_checkpoint(self) -> None:
        """Prints the measures of the checkpoint that the arguments name; saves its predictions if asked to."""
        model = self.task.load_model(self.arguments.checkpoint).to(self.accelerator.device).eval()
        print(json.dumps(self.measure(model)))
        if self.arguments.predictions is not None:
            predictions = {"predictions": self.task.predict(model)}
            write_beside(Path(self.arguments.predictions), lambda path: save_file(predictions, path))


def interleaved_latency(models: list[PreTrainedModel], batch: Mapping[str, Tensor], repeats: int) -> tuple[float, ...]:
    """Returns each model's median time for one forward pass in milliseconds; the models take turns."""
    times: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for model, record in zip(models, times, strict=True):
                started = time.perf_counter()
                model(**batch)
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
                if turn > 0:  # the first is warm-up
                    record.append(1e3 * (time.perf_counter() - started))
    return tuple(round(statistics.median(record), 3) for record in times)


def render(results: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Returns the table of all stages of all polynomials, with what its columns and stages mean."""
    rows = []
    for spec, result in results["specs"].items():
        for stage, values in result["stages"].items():
            scores = [f"{values[name]:.4f}" for name in columns]
            ratio = values["latency_ms"] / values["softmax_latency_ms"]
            steps = values.get("steps", "")
            rows.append((spec, stage, steps, *scores, f"{values['latency_ms']:.1f}", f"{ratio:.2f}"))
    header = ("spec", "stage", "steps", *columns, "latency_ms", "vs_softmax")
    meanings = {
        "spec": "the polynomial: poly3 is x³/√n, -l1 divides by the row's sum, ^16 is a 16th power",
        **columns,
        "latency_ms": "median time for a small held-out batch in milliseconds, measured in turns with softmax",
        "vs_softmax": "that time divided by the softmax model's; below 1 is faster",
    }
    width = max(map(len, (*meanings, *STAGES)))
    lines = [f"{name.ljust(width)}  {meaning}" for name, meaning in (*STAGES.items(), *meanings.items())]
    return "\n".join(["", format_table(header, rows), "", *lines])
