"""The results of all arms side by side, and how they came about."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from hf_polyattn.tables import format_table

from .arguments import CONTROL, FinetuningArguments
from .runs import describe_device, peak_memory_mib, versions
from .task import Task


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


def render(results: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Returns the table of all stages of all arms, with what its columns mean."""
    first = next(iter(columns))
    control = results["arms"].get(CONTROL)
    rows = []
    for spec, arm in results["arms"].items():
        for stage, values in arm["stages"].items():
            against = "" if control is None else f"{values[first] - control['stages']['finetuned'][first]:+.4f}"
            before, after = arm["spent"]["steps_before"], arm["spent"]["steps"]
            steps = {"finetuned": before + after, "reloaded": before + after, "calibrated": before}.get(stage, 0)
            rows.append((spec, stage, steps, *(f"{values[name]:.4f}" for name in columns), against))
    meanings = {**columns, "vs_control": f"{first} minus that of the fine-tuned softmax model, under the same budget"}
    width = max(map(len, meanings))
    lines = [f"{name.ljust(width)}  {meaning}" for name, meaning in meanings.items()]
    return "\n".join(["", format_table(("arm", "stage", "steps", *columns, "vs_control"), rows), "", *lines])
