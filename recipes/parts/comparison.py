"""The results of all arms side by side, and how they came about."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from transformers import Trainer

from hf_polyattn.tables import format_table

from .arguments import CONTROL, FinetuningArguments
from .runs import describe_device, peak_memory_mib, versions
from .task import Task

STAGES = {
    "softmax": "the checkpoint as it was published",
    "patched": "softmax swapped for the polynomial, nothing else",
    "calibrated": "each head's polynomial computed in closed form, no training on the task",
    "finetuned": "trained for as many steps as the column says (0: not at all)",
    "reloaded": "saved, and loaded with plain from_pretrained: the same predictions",
}


def circumstances(
    arguments: FinetuningArguments, task: Task, accelerator: Accelerator, started: float
) -> dict[str, Any]:
    """Returns what the numbers of a run were measured on, and how long it took since `started`."""
    return {
        "model": arguments.model,
        "data": task.data,
        "arguments": arguments.to_dict(),
        "seed": arguments.seed,
        "device": describe_device(accelerator),
        "versions": versions(),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "peak_memory_mib": peak_memory_mib(),
    }


def spent(trainer: Trainer, before: int, unit: str) -> dict[str, int]:
    """Returns the budget that an arm has used up: steps and data of fine-tuning, and the steps before it.

    Args:
        trainer: that trained it.
        before: steps before the trainer's.
        unit: what the budget is counted in, see `Task`.
    """
    steps, arguments = trainer.state.global_step, trainer.args
    examples = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    spent = {"steps": steps, "steps_before": before, "examples_at_most": steps * examples}
    return spent | ({"tokens": int(trainer.state.num_input_tokens_seen)} if unit == "tokens" else {})


def render(results: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Returns the table of all stages of all arms, with what its stages and columns mean."""
    first = next(iter(columns))
    seen = {stage for arm in results["arms"].values() for stage in arm["stages"]}
    meanings = {**{stage: meaning for stage, meaning in STAGES.items() if stage in seen}, **columns}
    control = results["arms"].get(CONTROL)
    if control is not None and "finetuned" in control["stages"]:
        meanings["vs_control"] = f"{first} minus that of the fine-tuned softmax model, under the same budget"
    if any("latency_ms" in arm["stages"].get("finetuned", ()) for arm in results["arms"].values()):
        meanings["latency_ms"] = "median time for a small held-out batch in milliseconds, in turns with softmax"
        meanings["vs_softmax"] = "that time divided by the softmax model's; below 1 is faster"
    rows = []
    for spec, arm in results["arms"].items():
        before, after = arm["spent"]["steps_before"], arm["spent"]["steps"]
        steps = {"finetuned": before + after, "reloaded": before + after, "calibrated": before}
        for stage, values in arm["stages"].items():
            row = [spec, stage, steps.get(stage, 0), *(f"{values[name]:.4f}" for name in columns)]
            if "vs_control" in meanings:
                row.append(f"{values[first] - control['stages']['finetuned'][first]:+.4f}")
            if "latency_ms" in meanings:
                row += [f"{values['latency_ms']:.1f}", f"{values['latency_ms'] / values['softmax_latency_ms']:.2f}"]
            rows.append(row)
    lost = [f"{spec} diverged: {arm['diverged']}" for spec, arm in results["arms"].items() if arm.get("diverged")]
    header = ("arm", "stage", "steps", *(name for name in meanings if name not in STAGES))
    width = max(map(len, meanings))
    lines = [f"{name.ljust(width)}  {meaning}" for name, meaning in meanings.items()]
    return "\n".join(["", format_table(header, rows), "", *lost, *lines])
