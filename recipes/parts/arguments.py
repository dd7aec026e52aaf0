"""What the fine-tuning recipes can be told."""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.utils import logging

from hf_polyattn import InputError, Polynomial

CONTROL = "softmax"  # the arm that is fine-tuned as it is


@dataclasses.dataclass
class FinetuningArguments(TrainingArguments):
    """What every recipe can be told, beside what `transformers.TrainingArguments` has."""

    model: str = dataclasses.field(default="", metadata={"help": "path or Hub name of the softmax checkpoint"})
    from_scratch: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "train new weights: --model gives the config only, and may be a model type such as marian. Nothing "
            "is calibrated; an arm that diverges is written down, and the next one runs"
        },
    )
    config_overrides: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "with --from_scratch: settings of the config, such as n_layer=4"}
    )
    tokenizer: str | None = dataclasses.field(
        default=None, metadata={"help": "path or Hub name; default: the model's, or from scratch a trained one"}
    )
    learnable: bool = dataclasses.field(default=True, metadata={"help": "train the polynomials, too"})
    initial_coefficients: list[float] = dataclasses.field(
        default_factory=list,
        metadata={"help": "with --adapt none or --from_scratch: of t^0, t^1 …, in place of the bare monomial's"},
    )
    row_shift: Literal["none", "moments"] = dataclasses.field(
        default="none",
        metadata={
            "help": "with --adapt none or --from_scratch: moments moves the scores of a row by their mean and variance"
        },
    )
    norms: bool = dataclasses.field(
        default=False, metadata={"help": "log the norms of each layer's attention and of its Jacobian, softmax's too"}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = dataclasses.field(
        default="float32",
        metadata={"help": "of the weights; auto: the checkpoint's. --bf16 keeps them, and computes in it"},
    )
    spec: list[str] = dataclasses.field(
        default_factory=lambda: [CONTROL, "poly6-l1"],
        metadata={"help": 'the arms, each from the checkpoint: polynomials, and "softmax", the control'},
    )
    calibrate_only: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "those of the arms that are not trained"}
    )
    adapt: Literal["calibrate", "none"] = dataclasses.field(
        default="calibrate", metadata={"help": "how the polynomials start: in closed form, or as bare monomials"}
    )
    measure: Literal["all", "last"] = dataclasses.field(
        default="all",
        metadata={
            "help": "every stage, or only the fine-tuned model: before a new head is trained, none says anything"
        },
    )
    calibration_batches: int = dataclasses.field(default=16, metadata={"help": "of per_device_eval_batch_size rows"})
    anneal: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "polynomials to go through before the arm's own"}
    )
    anneal_steps: int = dataclasses.field(default=100, metadata={"help": "training steps of each of them"})
    align_steps: int = dataclasses.field(
        default=0, metadata={"help": "steps of partition alignment before the polynomials of arms without l1"}
    )
    layer_steps: int = dataclasses.field(
        default=0, metadata={"help": "steps in which each calibrated polynomial is matched to softmax by itself"}
    )
    coefficient_learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "peak, of the polynomials; default 2e-3, for l1 specs 1e-4"}
    )
    distill_weight: float = dataclasses.field(
        default=0.0, metadata={"help": "adds so many times the divergence from the softmax teacher to the loss"}
    )
    teacher: str | None = dataclasses.field(
        default=None, metadata={"help": "softmax teacher, for example a fine-tuned control; default: the checkpoint"}
    )
    dropout: float | None = dataclasses.field(
        default=None, metadata={"help": "of all layers while training; default: the checkpoint's"}
    )
    lora_rank: int = dataclasses.field(default=0, metadata={"help": "train LoRA adapters and polynomials; 0: all"})
    lora_alpha: int = dataclasses.field(default=16, metadata={"help": "scale of the adapters, times their rank"})
    lora_dropout: float = dataclasses.field(default=0.0, metadata={"help": "before the adapters"})
    lora_targets: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "modules with adapters, by the end of their names; default: all linear ones"}
    )
    resume: bool = dataclasses.field(
        default=False, metadata={"help": "go on where a run with the same arguments was stopped"}
    )

    output_dir: str | None = "outputs/finetuning"
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    logging_steps: float = 10
    save_total_limit: int | None = 2
    report_to: None | str | list[str] = None  # noqa: RUF036 (HfArgumentParser needs this order)
    # Columns are chosen by the recipe; a loss that is not finite must be seen.
    remove_unused_columns: bool | None = False
    logging_nan_inf_filter: bool = False
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        if self.report_to is None:
            self.report_to = "tensorboard" if is_tensorboard_available() else "none"
        self.use_cpu = self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")  # bf16 asks for it
        super().__post_init__()
        if not sys.stderr.isatty():  # a log, where each step of a bar is a line
            self.disable_tqdm = True
            logging.disable_progress_bar()
        # Each process reads its own rows of a stream: collated batches differ in length and cannot be cut up.
        self.accelerator_config.dispatch_batches = False
        if not self.model:
            raise InputError("no --model given: the path or Hub name of a softmax checkpoint")
        self._check_scratch()
        if self.norms and self.logging_steps < 1:
            raise InputError(
                f"--norms are logged with the loss: set --logging_steps to whole steps, not {self.logging_steps}"
            )
        if self.load_best_model_at_end:
            raise InputError("--load_best_model_at_end is not supported: arms are compared after the same budget")
        for spec in [*self.spec, *self.anneal, *self.calibrate_only]:
            if spec != CONTROL:
                Polynomial.parse(spec)
        before = [spec for spec in self.spec if self.steps_before(spec)]
        if before and self.lora_rank > 0:
            raise InputError("--align_steps and --anneal train all weights; they do not go with --lora_rank")
        if self.adapt == "none" and (before or self.layer_steps):
            raise InputError(
                "--align_steps, --anneal and --layer_steps go with calibration; they do not go with --adapt none"
            )
        needed = max(map(self.steps_before, before), default=0)
        if needed > max(0, self.max_steps):
            raise InputError(
                f"--align_steps and --anneal_steps are part of the budget: set --max_steps, now {self.max_steps}, to "
                f"{needed} or more"
            )

    def _check_scratch(self) -> None:
        """Takes what goes without a checkpoint as said, and refuses what needs one."""
        if not self.from_scratch:
            if self.config_overrides or self.tokenizer:
                raise InputError("--config_overrides and --tokenizer are for --from_scratch; a checkpoint has its own")
            return
        needs = {"align_steps", "anneal", "layer_steps", "calibrate_only", "lora_rank"}
        given = sorted(name for name in needs if getattr(self, name))
        if given or (self.distill_weight and self.teacher is None):
            name = given[0] if given else "distill_weight without --teacher"
            raise InputError(f"--{name} needs a softmax checkpoint; with --from_scratch there is none")
        self.adapt, self.measure = "none", "last"

    def steps_before(self, spec: str) -> int:
        """Returns how many steps of an arm's budget may be spent before its own polynomials train."""
        if spec == CONTROL or spec in self.calibrate_only:
            return 0
        return self.aligned(spec) + len(self.anneal) * self.anneal_steps

    def aligned(self, spec: str) -> int:
        """Returns the steps of alignment of an arm: none with l1, which divides by the partition sum itself."""
        return 0 if spec == CONTROL or has_row_sum(spec) else self.align_steps

    def decisive(self) -> dict[str, object]:
        """Returns the arguments on which the numbers of an arm depend: `--resume` must be given the same."""
        names = (
            *("model", "dtype", "adapt", "calibrate_only", "calibration_batches"),
            *("from_scratch", "config_overrides", "tokenizer", "learnable", "initial_coefficients", "row_shift"),
            *("anneal", "anneal_steps", "align_steps", "layer_steps"),
            *("distill_weight", "teacher", "dropout"),
            *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "learning_rate", "coefficient_learning_rate"),
            *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
            *("warmup_steps", "weight_decay", "max_grad_norm", "data_seed", "bf16", "fp16", "label_smoothing_factor"),
        )
        return {name: getattr(self, name) for name in names}


def has_row_sum(spec: str) -> bool:
    """Returns whether an arm's polynomial is divided by its row sum; the control's is none."""
    return spec != CONTROL and Polynomial.parse(spec).normalizer == "l1"
