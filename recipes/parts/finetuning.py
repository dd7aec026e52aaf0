"""Fine-tuning under one budget: the softmax checkpoint as control, and polynomial models that start from it.

A recipe says what its model, data and metrics are, as a `Task`, with labels or without; `finetune` brings each `--spec`
from the checkpoint to a saved model:

    softmax → patched → (aligned, annealed) calibrated → fine-tuned → saved → reloaded

and measures it at each stage on held-out rows. From scratch it is new weights → patched → trained → saved → reloaded.
"""

from __future__ import annotations

import copy
import json
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, set_seed

import hf_polyattn
from hf_polyattn import DivergenceError, InputError, Monitor, MonitorCallback, PolyAttnError
from hf_polyattn.adaptation.distillation import LEARNING_RATES
from hf_polyattn.adaptation.training import evaluating

from .adapters import add_adapters, config_of_base
from .adapting import adapt
from .arguments import CONTROL, FinetuningArguments, has_row_sum
from .comparison import circumstances, render, spent
from .polynomials import check_coefficients, make_polynomial
from .resuming import last_checkpoint, prepare_output
from .runs import loaded_whole, timed, write_json, written_beside
from .task import Task, check_task
from .trainer import FinetuningError, PolyAttentionTrainer, set_dropout


def finetune(task: Task, arguments: FinetuningArguments) -> dict[str, Any]:
    """Brings every arm through its stages, writes `all_results.json` and prints the table.

    Raises:
        InputError: the output folder has another run in it, or arguments that do not go together.
        SaveError: a checkpoint or result could not be written.
        FinetuningError: a loss is not finite, in a run that is not from scratch.
    """
    return Arms(task, arguments).run()


class Arms:
    """The arms of one run: each from the same checkpoint, with the same seed, data order and budget."""

    def __init__(self, task: Task, arguments: FinetuningArguments) -> None:
        self.task, self.arguments = task, arguments
        self.output = Path(arguments.output_dir or ".")
        check_task(task, arguments)
        check_coefficients(arguments)
        self.softmax = self.start()
        # Its accelerator, which all trainers share, also serves to measure.
        trainer = PolyAttentionTrainer(model=self.softmax, args=copy.copy(arguments), eval_dataset=task.held_out)
        self.accelerator = trainer.accelerator
        self.main = self.accelerator.is_main_process
        for spec in set(arguments.spec) - {CONTROL}:  # what cannot be patched is said before anything is trained
            hf_polyattn.unpatch_model(make_polynomial(self.softmax, spec, arguments, task.patch_options))
        self.sharded = self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if self.sharded and task.generate is not None:
            raise InputError("models that generate must be whole in each process; use configs/multi_gpu.yaml")
        if self.sharded and arguments.lora_rank > 0:
            raise InputError("--lora_rank is for models that each process holds whole; use configs/multi_gpu.yaml")
        decisive = {**arguments.decisive(), "processes": self.accelerator.num_processes, "data": task.data}
        prepare_output(self.output, arguments.spec, decisive, arguments.resume, self.accelerator)
        self.started = time.perf_counter()
        self.score = task.score if task.labelled else partial(task.score, expected=self.predict(self.softmax))
        self.baseline: dict[str, Any] = {}
        self.measure_stage(self.baseline, "softmax", self.softmax)
        if task.beside is None and (not arguments.distill_weight or arguments.teacher is not None):
            del self.softmax  # it is not the teacher

    def run(self) -> dict[str, Any]:
        """Returns the results of all arms; those of a run that is resumed are not trained again."""
        results: dict[str, Any] = {"arms": {}}
        for spec in self.arguments.spec:
            file = self.output / spec / "results.json"
            results["arms"][spec] = json.loads(file.read_text()) if file.exists() else self.run_arm(spec)
            results |= circumstances(self.arguments, self.task, self.accelerator, self.started)
            write_json(self.output / "all_results.json", results, self.accelerator)
        if self.main:
            print(render(results, self.task.columns))
            print(f"\nWritten to {self.output}: all_results.json, and for each arm a checkpoint in <spec>/model.")
        return results

    def run_arm(self, spec: str) -> dict[str, Any]:
        """Returns the measures of one arm; its model is saved in <spec>/model, unless it diverged."""
        task, arguments, folder = self.task, self.arm_arguments(spec), self.output / spec
        stages = dict(self.baseline)
        seconds: dict[str, float] = {}
        calibration = None

        model = self.start().to(self.accelerator.device)
        if spec != CONTROL:
            make_polynomial(model, spec, arguments, task.patch_options)
            self.measure_stage(stages, "patched", model)
        if spec != CONTROL and arguments.adapt == "calibrate":
            with timed(seconds, "adapt"):
                calibration = adapt(model, spec, task, arguments, self.accelerator)
            self.measure_stage(stages, "calibrated", model)

        if arguments.dropout is not None:
            set_dropout(model, arguments.dropout)
        cached = model.config.use_cache if "use_cache" in model.config.to_dict() else None
        if arguments.lora_rank > 0:
            set_seed(arguments.seed)
            model = add_adapters(model, arguments, task.new_modules)
        trainer = self.trainer(model, arguments)
        diverged = None
        if arguments.max_steps != 0:
            with timed(seconds, "finetune"):
                diverged = self.train(trainer, folder)

        result: dict[str, Any] = {"stages": stages}
        if diverged is None:
            wrapped = trainer.model_wrapped
            model = self.accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
            if arguments.lora_rank > 0:
                self.save(folder / "adapter", model, None)
                model = wrapped = model.merge_and_unload()
            if cached is not None:
                model.config.use_cache = cached  # Trainer turned it off
            result |= self.finish(folder, model, wrapped, stages)
        result |= {
            "diverged": diverged,
            "spent": spent(trainer, arguments.steps_before(spec), task.unit),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "calibration": None if calibration is None else calibration.to_dict(),
            "log_history": trainer.state.log_history,
        }
        write_json(folder / "results.json", result, self.accelerator)
        if self.arguments.push_to_hub and self.main and diverged is None:
            self.push(spec)
        trainer.accelerator.free_memory()
        self.accelerator.free_memory()
        return result

    def trainer(self, model: Any, arguments: FinetuningArguments) -> PolyAttentionTrainer:
        """Returns the trainer of an arm, which logs the norms of attention if they are asked for."""
        task, callbacks = self.task, []
        if arguments.norms and arguments.max_steps != 0:
            callbacks.append(MonitorCallback(Monitor(model, every=int(arguments.logging_steps), norms=True)))
        return PolyAttentionTrainer(
            model=model,
            args=arguments,
            train_dataset=task.train if hasattr(task.train, "__len__") else task.train.shuffle(seed=arguments.seed),
            eval_dataset=task.held_out,  # for --eval_strategy; `measure` reads it
            data_collator=task.collate,
            processing_class=task.processor,
            teacher=self.teacher(),
            augment=task.augment,
            measure=lambda trained: self.measure(trained)[0],
            callbacks=callbacks,
        )

    def train(self, trainer: PolyAttentionTrainer, folder: Path) -> str | None:
        """Trains an arm; returns how it diverged, if it is from scratch and did."""
        try:
            trainer.train(resume_from_checkpoint=last_checkpoint(folder) if self.arguments.resume else None)
        except (FinetuningError, DivergenceError) as error:
            if not self.arguments.from_scratch:
                raise
            return str(error)
        finally:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, MonitorCallback):
                    callback.monitor.close()
        return None

    def finish(self, folder: Path, model: Any, wrapped: Any, stages: dict[str, Any]) -> dict[str, Any]:
        """Measures a trained model, saves it, and measures what is loaded again; returns what the arm is told by.

        Raises:
            PolyAttnError: what is loaded predicts something else.
        """
        stages["finetuned"], predictions = self.measure(model)
        others = {name: self.score(self.predict(model, rows)) for name, rows in self.task.other_held_out.items()}
        self.save(folder / "model", model, self.accelerator.get_state_dict(wrapped))
        stages["reloaded"], again = self.measure(self.load(folder / "model").to(self.accelerator.device))
        same = torch.equal(predictions.nan_to_num(), again.nan_to_num())  # a bare monomial may give NaN
        if not same and not self.sharded:
            difference = (predictions - again).abs().max()
            raise PolyAttnError(f"{folder / 'model'} predicts something else than what was saved, by {difference:.3g}")
        found = {"reload_is_equal": same, "checkpoint": str(folder / "model")}
        return {**found, "others": others} if others else found

    def start(self) -> PreTrainedModel:
        """Returns the softmax model that every arm starts from: the checkpoint, or new weights, the same each time."""
        if self.task.make_model is None:
            return self.load(self.arguments.model)
        set_seed(self.arguments.seed)
        with loaded_whole():
            return self.task.make_model().eval()

    def load(self, source: str | Path) -> PreTrainedModel:
        """Returns a model in eval mode; a new head starts from the same random numbers each time.

        Its weights are copied out of their file: how a product is rounded depends on where a matrix lies in memory, and
        what was saved and is loaded again is compared to the bit.
        """
        set_seed(self.arguments.seed)
        with loaded_whole():
            model = self.task.load_model(str(source), dtype=self.arguments.dtype).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    def arm_arguments(self, spec: str) -> FinetuningArguments:
        """Returns the arguments of an arm: its own folder, steps and learning rates."""
        arguments = copy.copy(self.arguments)
        arguments.output_dir = str(self.output / spec)
        if spec in arguments.calibrate_only:
            arguments.max_steps = arguments.align_steps = arguments.layer_steps = 0
            arguments.anneal = []
        elif arguments.max_steps > 0:
            arguments.max_steps -= arguments.steps_before(spec)
        arguments.push_to_hub = False  # of every checkpoint; the saved model is pushed at the end
        rates = LEARNING_RATES["l1" if has_row_sum(spec) else "fixed"]
        if arguments.learning_rate is None:
            arguments.learning_rate = rates[0]
        if arguments.coefficient_learning_rate is None:
            arguments.coefficient_learning_rate = rates[1]
        return arguments

    def teacher(self) -> PreTrainedModel | None:
        if not self.arguments.distill_weight:
            return None
        if self.arguments.teacher is None:
            return self.softmax
        return self.load(self.arguments.teacher).to(self.accelerator.device)

    def measure(self, model: torch.nn.Module) -> tuple[dict[str, float], Tensor]:
        """Returns a model's measures on the held-out examples, and its predictions."""
        predictions = self.predict(model)
        measures = self.score(predictions)
        if self.task.beside is not None:
            measures |= self.task.beside(model, self.softmax)
        return measures, predictions

    @torch.no_grad()
    def predict(self, model: torch.nn.Module, examples: Any = None) -> Tensor:
        """Returns a model's predictions on examples, by default the held-out ones; all processes share the work."""
        loader: Any = DataLoader(
            self.task.held_out if examples is None else examples,
            batch_size=self.arguments.per_device_eval_batch_size,
            collate_fn=self.task.collate,
        )
        loader, rows = self.accelerator.prepare_data_loader(loader), []
        for batch in tqdm(loader, desc="measure", disable=not self.main or self.arguments.disable_tqdm, leave=False):
            # bfloat16 would blur the distance from softmax, which is all that is measured without labels.
            with evaluating(model), self.accelerator.autocast() if self.task.labelled else nullcontext():
                found = self.task.predict(model(**batch), batch).float()
                if self.task.generate is not None:
                    found = torch.cat([found, self.task.generate(model, batch).float()], dim=1)
            rows.append(self.accelerator.gather_for_metrics(found).cpu())
        return torch.cat(rows)

    def measure_stage(self, stages: dict[str, Any], name: str, model: PreTrainedModel) -> None:
        """Measures a model that is not trained yet, unless only the fine-tuned one is to be measured."""
        if self.arguments.measure == "all":
            stages[name], _ = self.measure(model)

    def save(self, folder: Path, model: Any, state: dict[str, Tensor] | None) -> None:
        """Writes a model, or an adapter, with its processor; whole or not at all."""
        with written_beside(folder, self.accelerator) as partial:
            model.save_pretrained(partial, state_dict=state, is_main_process=self.main)
            if self.main and self.task.processor is not None:
                self.task.processor.save_pretrained(partial)
            if self.main and hasattr(model, "peft_config"):
                config_of_base(model).save_pretrained(partial)

    def push(self, spec: str) -> None:
        """Uploads the saved model of an arm, each arm to a repository of its own."""
        name = self.arguments.hub_model_id or self.output.name
        repository = f"{name}-{spec.replace('^', '-pow').replace('~', '-ref')}"
        model = self.load(self.output / spec / "model")
        token, private = self.arguments.hub_token, self.arguments.hub_private_repo
        for part in (model, self.task.processor):
            part.push_to_hub(repository, token=token, private=private)
