"""The training loop of the fine-tuning recipes: `transformers.Trainer`, with what polynomials need."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from hf_polyattn import InputError, PolyAttnError, param_groups
from hf_polyattn.adaptation.distillation import divergence

from .runs import written_beside


class FinetuningError(PolyAttnError):
    """A training that went wrong: the loss or its gradient is not a finite number."""


class PolyAttentionTrainer(Trainer):
    """A `Trainer` whose polynomials have their own learning rate, and whose checkpoints are whole or absent.

    Args:
        teacher: a softmax model whose outputs are matched, `args.distill_weight` times; None for none.
        augment: changes a batch before it is trained on. It draws from PyTorch's generator, whose state
            checkpoints hold, as dropout does; in a data loader, which looks ahead, it could not be resumed.
        measure: what `evaluate` is to return of the model.
        kwargs: of `Trainer`.
    """

    def __init__(
        self,
        *,
        teacher: PreTrainedModel | None = None,
        augment: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.teacher, self.augment, self.measure = teacher, augment, measure
        self.writing: Path | None = None

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """Trains, from a checkpoint if one is given; `Trainer` would train a step more from that of the last step."""
        if resume_from_checkpoint is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            if state.global_step >= state.max_steps:
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return TrainOutput(state.global_step, math.nan, {})
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the weights of a checkpoint into the model.

        Some models (ViT) are saved under the names of older checkpoints. `from_pretrained` knows them; `Trainer` leaves
        out what it does not know, with a warning, and would go on from other weights.
        """
        model = self.model if model is None else model
        if not isinstance(model, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Returns the optimizer that the arguments name, over `hf_polyattn.param_groups`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = param_groups(
                model,
                self.args.learning_rate,
                coefficient_lr=self.args.coefficient_learning_rate,
                weight_decay=self.args.weight_decay,
            )
            # The first group's rate is the one that is logged: the polynomials, if any, go last.
            self.optimizer = kind([*groups[1:], groups[0]], **options)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Returns the loss of a batch, whose gradient is added; raises FinetuningError if it is not finite."""
        if self.augment is not None:
            inputs = self.augment(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._require_finite(loss, "loss")
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the task's loss, if there are labels, and with a teacher how far the model is from it."""
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "output_hidden_states": True}
        if "labels" in inputs:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        else:
            loss, outputs = 0.0, model(**inputs)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad(), self.accelerator.autocast():
            target = self.teacher(**inputs)
        distance = divergence(outputs, target, inputs)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # Trainer divides by the number of accumulated batches only what is not a mean over all of them.
            distance = distance / self.current_gradient_accumulation_steps
        loss = loss + self.args.distill_weight * distance
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Returns, and logs, the recipe's measures of the model."""
        if self.measure is None:
            return super().evaluate(*args, **kwargs)
        metrics = {f"eval_{name}": value for name, value in self.measure(self.model).items()}
        self.log(metrics)
        return metrics

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Returns the gradient norm; with float16, whose scaler leaves such steps out, it need not be finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and self.accelerator.scaler is None:
            self._require_finite(norm, "norm of the gradient")
        return norm

    def _require_finite(self, value: Any, name: str) -> None:
        if not math.isfinite(value):
            raise FinetuningError(
                f"step {self.state.global_step + 1}: the {name} is {float(value)}. Checkpoints in "
                f"{self.args.output_dir} are from before it. Lower --learning_rate (now {self.args.learning_rate:g}) "
                f"or --coefficient_learning_rate, or start from calibrated polynomials."
            )

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.writing is None else str(self.writing)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint under another name, and only when all of it is there gives it its own."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with written_beside(folder, self.accelerator) as partial:
            self.writing = partial.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.writing = None
        if self.args.should_save:
            rotate_checkpoints(output_dir=self.args.output_dir, save_total_limit=self.args.save_total_limit)


def set_dropout(model: PreTrainedModel, probability: float) -> None:
    """Sets the dropout of every layer; the config, and so the saved model, keeps its own.

    Raises:
        InputError: not a probability.
    """
    if not 0.0 <= probability < 1.0:
        raise InputError(f"--dropout must be at least 0 and less than 1, got {probability}")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        # numbers that modules hand on, to attention or to a function: Marian and BART have no module for it
        for name in ("attention_dropout", "dropout_prob", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)
