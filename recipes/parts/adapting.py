"""From softmax to calibrated polynomials, before an arm is trained on its task."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import hf_polyattn

from .arguments import FinetuningArguments, has_row_sum
from .task import Task


def adapt(
    model: PreTrainedModel, spec: str, task: Task, arguments: FinetuningArguments, accelerator: Accelerator
) -> Any:
    """Aligns, anneals and calibrates a patched model in place; returns the report of the last calibration.

    Every process does the same on the same batches.
    """
    progress = accelerator.is_main_process
    if arguments.aligned(spec):
        with accelerator.autocast():
            hf_polyattn.align(
                model,
                list(islice(_batches(task, arguments, arguments.train_batch_size), arguments.align_steps)),
                steps=arguments.align_steps,
                lr=arguments.learning_rate,
                weight_decay=arguments.weight_decay,
                progress=progress,
            )
    if arguments.anneal:
        longest = max(arguments.anneal_steps, arguments.calibration_batches)
        hf_polyattn.anneal(
            model,
            list(islice(_batches(task, arguments, arguments.train_batch_size), longest)),
            arguments.anneal,
            steps=arguments.anneal_steps,
            calibration_batches=arguments.calibration_batches,
            progress=progress,
        )
    rows = _batches(task, arguments, arguments.per_device_eval_batch_size)
    batches = list(islice(rows, arguments.calibration_batches))
    calibration = hf_polyattn.calibrate(model, batches, spec=spec, progress=progress)
    if arguments.layer_steps and not has_row_sum(spec):
        hf_polyattn.match_layers(model, batches, steps=arguments.layer_steps, progress=progress)
    return calibration


def _batches(task: Task, arguments: FinetuningArguments, size: int) -> Iterator[dict[str, Any]]:
    """Yields batches of training rows without labels, in the order that the seed gives."""
    rows: Any = task.train.shuffle(seed=arguments.seed)
    for batch in DataLoader(rows, batch_size=size, collate_fn=task.collate):
        yield {name: value for name, value in batch.items() if name != "labels"}
