"""What a fine-tuning recipe brings to `finetuning.finetune`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from hf_polyattn import InputError

from .arguments import CONTROL, FinetuningArguments
from .sources import Rows


@dataclasses.dataclass(frozen=True)
class Task:
    """What a recipe fine-tunes, on what, and how it is measured.

    Attributes:
        data: what the data is, as JSON types, for the results.
        load_model: from a path or Hub name and `dtype=`; equal seeds give equal new heads.
        processor: tokenizer or image processor, saved beside the model.
        train: examples to train on; without a length they are a stream.
        held_out: examples to measure on.
        collate: makes a batch of model inputs, `labels` among them if there are any.
        predict: from a model's outputs and the batch, one row of float32 numbers an example.
        score: from the rows of all held-out examples, the measures; without labels also takes `expected=`, the rows of
            the softmax checkpoint.
        columns: their names and what they mean in a sentence; the first is the one by which arms are compared.
        unit: what the budget is counted in.
        labelled: False where the teacher's outputs are all that a model is trained and measured by.
        beside: from a model and the softmax checkpoint, measures of both, such as `Latency`; all processes call it.
        new_modules: names of modules that start from random numbers and are trained whole beside LoRA adapters.
        augment: changes a batch that is trained on.
        make_model: makes a model with new weights, for --from_scratch; equal seeds give equal ones.
        patch_options: of `hf_polyattn.patch_model`.
        generate: from a model and a batch, more numbers an example, which follow those of `predict`.
        other_held_out: name -> more examples to measure the trained model on.
    """

    data: dict[str, Any]
    load_model: Callable[..., PreTrainedModel]
    processor: Any
    train: Rows
    held_out: Any
    collate: Callable[[list[Any]], dict[str, Any]]
    predict: Callable[[Any, Mapping[str, Any]], Tensor]
    score: Callable[..., dict[str, float]]
    columns: dict[str, str]
    unit: Literal["tokens", "images"]
    labelled: bool = True
    beside: Callable[[Any, PreTrainedModel], dict[str, float]] | None = None
    new_modules: tuple[str, ...] = ()
    augment: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    make_model: Callable[[], PreTrainedModel] | None = None
    patch_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    generate: Callable[[Any, Mapping[str, Any]], Tensor] | None = None
    other_held_out: dict[str, Any] = dataclasses.field(default_factory=dict)


def check_task(task: Task, arguments: FinetuningArguments) -> None:
    """Raises InputError if a task cannot be trained as the arguments say."""
    if arguments.max_steps < 0 and not hasattr(task.train, "__len__"):
        raise InputError("a stream has no end that is known; set --max_steps")
    if not task.labelled and not arguments.distill_weight:
        raise InputError("without labels the distance from the teacher is the loss: set --distill_weight above 0")
    if arguments.distill_weight and task.new_modules and arguments.teacher is None:
        teacher = Path(arguments.output_dir or ".") / CONTROL / "model"
        raise InputError(
            f"the checkpoint has no {', '.join(task.new_modules)} for this task, so it cannot be the teacher; set "
            f"--teacher to a fine-tuned softmax model, for example {teacher}"
        )
