"""`MonitorCallback`: a `Monitor` in Transformers' `Trainer`."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback

from .monitor import Monitor


class MonitorCallback(TrainerCallback):  # type: ignore[misc]
    """Logs a monitor's scalars with the loss, and stops a `Trainer` whose training diverges.

    The scalars reach every tracker of `report_to` and `trainer_state.json`, but not the progress bar. A divergence
    raises `DivergenceError` before the update that would carry it into the weights, and before weights that are not
    finite are saved: the checkpoints that exist are good ones.

        monitor = hp.Monitor(model)
        Trainer(model, args, train_dataset=data, callbacks=[hp.MonitorCallback(monitor)]).train()
        monitor.close()

    Args:
        monitor: of the model that is trained.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def polyattn_scalars(self) -> dict[str, float]:
        """Returns what `Trainer.log` adds to the logs of a training step; see `hf_polyattn.hub.hooks`."""
        return self.monitor.scalars()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts on from a resumed checkpoint."""
        self.monitor.steps = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Checks outputs and gradients; not the gradients of fp16, whose scaler skips updates that are not finite."""
        self.monitor.check(gradients=getattr(optimizer, "scaler", None) is None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the update and, where a checkpoint follows, checks all weights."""
        self.monitor.step()
        if control.should_save:
            self.monitor.check_weights()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks all weights where a checkpoint follows."""
        if control.should_save:
            self.monitor.check_weights()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks all weights: with save_strategy="best" a checkpoint may follow."""
        self.monitor.check_weights()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Takes the scalars out again: trackers had them, and they would flood the progress bar that comes next."""
        for name in [name for name in logs or () if name.startswith("polyattn/")]:
            del logs[name]
