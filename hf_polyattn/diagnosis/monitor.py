"""Watching a training: what polynomial attention puts out, whether its scores leave their interval, and where the
first number appears that is none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DivergenceError, InputError, PatchError
from ..patching.core import PolyAttention, is_patched
from ..patching.patched import patched_layers
from ..patching.running import require_polynomial
from .sampling import polynomial_norms, sample_rows, shares_outside
from .softmax_probe import SoftmaxProbe, Unwatched, softmax_probes

_NEVER = 2**62


class Monitor:
    """Watches the polynomial attention of a model while it trains, until it is closed.

    Every forward pass with gradients and every backward pass is looked at for numbers that are not finite: one
    reduction a layer, and no waiting for the device before `check`. Every `every`-th step also records `scalars`.
    Forward passes without gradients (evaluation) and inside `torch.compile` are not watched.

        with Monitor(model) as monitor:
            for step, batch in enumerate(loader):
                loss = model(**batch).loss
                accelerator.backward(loss)
                monitor.check()  # before the update: the weights are still good
                optimizer.step()
                optimizer.zero_grad()
                monitor.step()
                accelerator.log(monitor.scalars(), step=step)

    With `Trainer`, `MonitorCallback(monitor)` does this. Copies and pickles of the model have no monitor.

    Attributes:
        steps: updates so far, as counted by `step`.

    Args:
        model: a patched model, calibrated or not; with `norms` also a softmax model, or one that is both. Parameters
            that require a gradient now are watched in backward.
        every: steps between two records of `scalars`.
        norms: record norms of attention, of softmax layers too.

    Raises:
        PatchError: the model is not patched, or is not running its polynomials; with `norms`, it has no attention whose
            norms can be watched.
        InputError: `every` is not at least 1.
    """

    def __init__(self, model: nn.Module, *, every: int = 10, norms: bool = False) -> None:
        if every < 1:
            raise InputError(f"every must be at least 1 step, got {every}")
        if not norms and not is_patched(model):
            raise PatchError(
                f"{type(model).__name__} is not patched; call patch_model(model, spec) first, or watch its softmax "
                "with Monitor(model, norms=True)"
            )
        if is_patched(model):
            require_polynomial(model)
        self.model = model
        self.every, self.norms = every, norms
        self.steps = 0
        self._softmax: list[SoftmaxProbe] = softmax_probes(model, self.is_due) if norms else []
        layers = patched_layers(model)
        self._probes = [_Probe(self, path, layer, i, len(layers)) for i, (path, layer) in enumerate(layers)]
        if not self._probes and not self._softmax:
            raise PatchError(f"{type(model).__name__} has no attention whose norms can be watched")

    def step(self) -> None:
        """Counts an update of the weights."""
        self.steps += 1

    def is_due(self, record: dict[str, Tensor]) -> bool:
        """Returns whether a layer with this last record is to be recorded in the step that is under way."""
        return not record or (self.steps + 1) % self.every == 0

    def scalars(self) -> dict[str, float]:
        """Returns the last record, for a tracker: `polyattn/<what>/<path>` for each layer; empty before the first.

        `output_rms` and `output_max`, root mean square and largest magnitude of the attention output;
        `coefficient_max`, of the coefficients; and with an interval `outside`, the share of scores outside it, and
        `above`, of those beyond its top. With `norms`, of softmax layers too, `attention_norm` ‖A‖_F/√N and
        `jacobian_norm` ‖∇A‖_F/√N for N query rows, of the largest head: at most 1 and 2 for softmax (arXiv 2410.18613,
        Theorem 4.1). Shares and norms are estimated on a few query rows, padding among them. Of this process only.
        """
        probes: list[_Probe | SoftmaxProbe] = [*self._probes, *self._softmax]
        records = {f"polyattn/{name}/{probe.path}": number for probe in probes for name, number in probe.record.items()}
        return dict(zip(records, _stacked(list(records.values())).tolist(), strict=True))

    def check(self, *, gradients: bool = True) -> None:
        """Raises if an output, a gradient or a parameter of a polynomial is not a finite number; forgets it then.

        Call it after backward and before the update, on every process: all of them raise, or none.

        Args:
            gradients: whether gradients count. Pass False under a gradient scaler (fp16), which skips such updates.

        Raises:
            DivergenceError: names the layer where it began: the first such output in the order of the forward
                pass, else the first gradient in the order of the backward pass, else the first layer with such a
                parameter.
        """
        if not self._probes:
            return
        found = _stacked([since for probe in self._probes for since in probe.first(gradients)])
        first = int(_least(found))
        if first == _NEVER:
            return
        for probe in self._probes:
            probe.forget()
        step, slot = divmod(first, 3 * len(self._probes))
        kind, i = divmod(slot, len(self._probes))
        # Slots are numbered in the order of time: outputs forward, gradients backward, then parameters.
        probe = self._probes[-1 - i if kind == 1 else i]
        what = ("the output", "the gradient of the polynomial", "a parameter of the polynomial")[kind]
        origin = ""
        if kind == 0 and probe.parameters_are_finite():
            origin = " Its polynomial is finite, so the cause is there or in the layers before it."
        elif kind == 1 and not probe.record:
            origin = " Forward passes were not seen, so it may have begun there: run a step without torch.compile."
        elif kind == 1 and i == 0:
            origin = " It is the last polynomial layer: the loss, or what follows that layer, may be the cause."
        raise DivergenceError(
            f"after {step} updates, {what} of {probe.path!r} is not finite, before that of any other layer.{origin} "
            "Go back to the last good weights; lower the learning rate, of the polynomials first "
            "(param_groups(..., coefficient_lr=...)), and see what diagnose(model, batches) finds."
        )

    def check_weights(self) -> None:
        """Raises if any weight of the model is not a finite number: before saving it. Reads all of them.

        Raises:
            DivergenceError: names the first such parameter.
        """
        parameters = list(self.model.named_parameters())
        flags = [torch.where(_is_finite(p), _NEVER, i) for i, (_, p) in enumerate(parameters)]
        first = int(_least(_stacked(flags)))
        if first < _NEVER:
            raise DivergenceError(
                f"after {self.steps} updates, the weight {parameters[first][0]!r} is not finite; the model must not be "
                "saved. Go back to the last good weights and lower the learning rate."
            )

    def close(self) -> None:
        """Takes every hook off the model; what was recorded can still be read. Safe to call again."""
        probes: list[_Probe | SoftmaxProbe] = [*self._probes, *self._softmax]
        for probe in probes:
            probe.remove()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Probe:
    """The hooks of one layer and what they have seen; tensors stay on the layer's device."""

    def __init__(self, monitor: Monitor, path: str, layer: PolyAttention, number: int, layers: int) -> None:
        self.monitor, self.path, self.layer = monitor, path, layer
        self.number, self.layers = number, layers
        self.record: dict[str, Tensor] = {}
        self.output_since = self.gradient_since = self._constant(_NEVER)
        trained: list[Any] = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        self.handles: list[Any] = [layer.register_forward_hook(self, with_kwargs=True)]
        self.handles += [parameter.register_hook(self.see_gradient) for parameter in trained]

    def __reduce__(self) -> tuple[Any, ...]:
        return Unwatched, ()  # a copy of the model is another model

    def __call__(self, layer: PolyAttention, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Sees one forward pass of the layer, if it is a training's."""
        output = output[0] if isinstance(output, tuple) else output
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and output.numel() > 0:
            self.see_output(layer, args, kwargs, output.detach())

    @torch.no_grad()
    def see_output(
        self, layer: PolyAttention, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """Sees an output of the layer, and what it was computed from."""
        lowest, highest = output.aminmax()  # of which NaN makes NaN
        self.output_since = self._since(self.output_since, lowest.isfinite() & highest.isfinite(), self.number)
        if not self.monitor.is_due(self.record):
            return
        self.record = {
            "output_rms": output.float().square().mean().sqrt(),
            "output_max": torch.maximum(-lowest, highest).float(),
            "coefficient_max": layer.changed_coefficients().abs().amax(),
        }
        if layer.config.interval or self.monitor.norms:
            self.see_scores(layer, args, kwargs)

    def see_scores(self, layer: PolyAttention, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        """Records what a few rows of scores say."""
        pattern: dict[str, Any] = {name: kwargs.get(name) for name in ("mask", "ranges", "window", "scaling")}
        with torch.autocast(args[0].device.type, enabled=False):
            sample = sample_rows(args[0], args[1], causal=kwargs.get("causal", False), **pattern)
            if layer.config.interval:
                self.record["outside"], self.record["above"] = shares_outside(layer, sample)
            if self.monitor.norms:
                norms = polynomial_norms(layer, sample)
                self.record["attention_norm"], self.record["jacobian_norm"] = norms

    def see_gradient(self, gradient: Tensor) -> None:
        """Sees the gradient of one parameter."""
        self.gradient_since = self._since(self.gradient_since, _is_finite(gradient), 2 * self.layers - 1 - self.number)

    @torch.no_grad()
    def first(self, gradients: bool) -> list[Tensor]:
        """Returns when the output, a gradient and a parameter were first not finite; see `_since`."""
        parameters = self._constant(_NEVER)
        for parameter in self.layer.parameters():
            parameters = self._since(parameters, _is_finite(parameter), 2 * self.layers + self.number)
        return [self.output_since, *([self.gradient_since] if gradients else []), parameters]

    def parameters_are_finite(self) -> bool:
        """Whether they are now."""
        return all(bool(_is_finite(parameter)) for parameter in self.layer.parameters())

    def forget(self) -> None:
        """Forgets what was not finite."""
        self.output_since = self.gradient_since = self._constant(_NEVER)

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()

    def _since(self, since: Tensor, finite: Tensor, slot: int) -> Tensor:
        """Returns the earlier of `since` and, unless finite, now: int64, ordered in time by step, then by slot."""
        now = self.monitor.steps * 3 * self.layers + slot
        return torch.minimum(since.to(finite.device), torch.where(finite, _NEVER, now))

    def _constant(self, number: int) -> Tensor:
        return torch.tensor(number, device=self.layer.coefficients.device)


def _is_finite(tensor: Tensor) -> Tensor:
    """Returns whether all numbers are finite, of a sharded tensor this process's part: bool, 0-dim."""
    local: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return local.detach().isfinite().all()


def _stacked(numbers: list[Tensor]) -> Tensor:
    """Returns 0-dim tensors of any device as one tensor, so that the device is waited for once."""
    return torch.stack([number.to(numbers[0].device) for number in numbers]) if numbers else torch.empty(0)


def _least(numbers: Tensor) -> Tensor:
    """Returns the least of int64 numbers, over all processes."""
    least = numbers.min()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return least
