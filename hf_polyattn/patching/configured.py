"""What a `PolyAttention` holds: its tensors and its config, made, configured, frozen, reset, and loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..spec import PolyAttentionConfig, Polynomial
from . import settings
from .relative import RelativePolynomial, initial_directions, no_change, warn_of_rounding
from .resuming import mark_untrained
from .row_shift import MomentShift, shift_modules


class ConfiguredPolynomial(RelativePolynomial):
    """The tensors of one attention module's polynomial, and the config that says what they mean and which train.

    Attributes:
        coefficients, delta, directions: Parameters, of a `RelativePolynomial`, with one row for all heads under
            granularity `layer`: p as it was calibrated, and how training changed it.
        center: Parameter (H,); used once `config.interval` is set.
        key_shift: Parameter (H, D), μ_h; used once `config.key_shift` is set.
        radius: Parameter (H,), positive, without gradient; used once `config.interval` is set. It is no buffer, because
            Accelerate leaves buffers where they are when it offloads a checkpoint's weights.
        settings: buffer uint8 (256,), what of the config the tensors' meaning depends on; loading a state dict
            restores it into the config. See `settings.py`.
        moments: a `MomentShift` where `config.row_shift` is moments.
        refinements: a `Refinement` for each that the spec asks for.
        config: the `PolyAttentionConfig` this module was made from; replaced by calibration.

    All but the settings stay float32 when the model is cast to a lower precision.

    Args:
        config: what to be.
        heads: H, query heads.
        head_dim: D, of queries and keys.
        device: of the parameters.
    """

    center: nn.Parameter
    key_shift: nn.Parameter
    radius: nn.Parameter
    settings: Tensor
    moments: MomentShift | None
    refinements: nn.ModuleList | None
    # What Transformers asks before it initializes a module: only its loader knows that something is missing.
    _is_hf_initialized: bool = True

    def __init__(
        self, config: PolyAttentionConfig, heads: int, head_dim: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        self.head_dim = head_dim
        rows = heads if config.granularity == "head" else 1
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.make_polynomials(rows, config.spec.degree, **options)
        self.center = nn.Parameter(torch.empty(heads, **options))
        self.key_shift = nn.Parameter(torch.empty(heads, head_dim, **options))
        self.radius = nn.Parameter(torch.empty(heads, **options), requires_grad=False)
        self.register_buffer(settings.NAME, settings.encoded(config, self.place))
        self.moments = self.refinements = None
        self.configure(config)
        self._reset_own()

    @property
    def place(self) -> torch.device | None:
        """Where the parameters are; None for those on the meta device, which will be elsewhere."""
        return None if self.coefficients.is_meta else self.coefficients.device

    def configure(self, config: PolyAttentionConfig) -> None:
        """Replaces the config, and freezes the parameters that it does not use or does not train.

        A frozen polynomial that the config before would have trained was frozen by somebody, and stays so.
        """
        trained = config.learnable and (self.delta.requires_grad or not self.config.learnable)
        self.config = config
        self._is_hf_initialized = True
        self._fit_row_shift()
        self.train_polynomial(trained)
        self.write_settings()
        self.freeze_unused()

    def _fit_row_shift(self) -> None:
        """Makes the parts of the row shift that the config asks for, of its sizes, and drops the others."""
        rows, device = self.coefficients.shape[0], self.center.device
        wanted = shift_modules(self.config, rows, self.heads, self.head_dim, device)
        for name in ("moments", "refinements"):
            current, part = getattr(self, name), wanted.get(name)
            if part is None or current is None or _sizes(part) != _sizes(current):
                setattr(self, name, part)

    @torch.no_grad()
    def write_settings(self) -> None:
        """Brings the settings up to date with the config."""
        if not self.settings.is_meta:
            self.settings.copy_(settings.encoded(self.config))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + settings.NAME
        if key in state_dict:
            self.configure(settings.restored(self.config, state_dict[key], key))
        own = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        added: dict[str, Tensor] = {}
        if "coefficients" in own and own["coefficients"].shape == self.coefficients.shape:
            if settings.NAME not in own:
                raise CheckpointError(
                    f"{prefix}coefficients come without {settings.NAME}: hf_polyattn 0.1.0 saved them, and they do not "
                    "say what they mean. Load their folder with from_pretrained, and go on from that model, without "
                    "the optimizer's state: the parameters that it is of are no longer those that train."
                )
            warn_of_rounding(own["coefficients"], "a state dict")
            added = no_change(own, self.config)
            state_dict.update({prefix + name: tensor for name, tensor in added.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
        if added:
            mark_untrained(self.delta)

    def train_polynomial(self, trained: bool) -> None:
        """Makes all that a polynomial can learn ask for gradients, or nothing of it."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trained and _learns(name))

    def freeze_unused(self) -> None:
        """Freezes what gets no gradient under the config, whatever loaded, copied or wrapped the parameters."""
        config = self.config
        used = {"center": config.interval, "key_shift": config.key_shift, "moments.squares": config.squares > 0}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and not (config.learnable and _learns(name) and used.get(name, True)):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Sets the module's mode; before a training, freezes what a model's `requires_grad_(True)` should not reach."""
        self.freeze_unused()
        return super().train(mode)

    def change_spec(self, spec: Polynomial) -> None:
        """Takes another polynomial, uncalibrated; center, radius and key shift stay as they are."""
        rows, trained, old = self.coefficients.shape[0], self.delta.requires_grad, self.coefficients
        self.config = replace(self.config, spec=spec)
        self._fit_row_shift()
        self.make_polynomials(rows, spec.degree, dtype=old.dtype, device=old.device)
        self.delta.requires_grad_(trained)
        self._reset_coefficients()
        self.write_settings()

    @torch.no_grad()
    def _reset_coefficients(self) -> None:
        initial = self.config.spec.initial_coefficients()
        self.coefficients.copy_(self.coefficients.new_tensor(initial).expand_as(self.coefficients))
        self.delta.zero_()
        self.directions.copy_(initial_directions(self.config.spec).expand_as(self.directions))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the spec's uncalibrated coefficients, center 0, radius 1 and no key shift; the config stays."""
        self._reset_own()
        for part in (self.moments, *(self.refinements or ())):
            if part is not None:
                part.reset_parameters()

    @torch.no_grad()
    def _reset_own(self) -> None:
        self._reset_coefficients()
        self.center.zero_()
        self.key_shift.zero_()
        self.radius.fill_(1.0)
        self.write_settings()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if tensor.is_floating_point() and applied.dtype in (torch.bfloat16, torch.float16):
                return tensor.to(applied.device)
            return applied

        empty = self.coefficients.is_meta
        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        if empty and not self.coefficients.is_meta:  # `to_empty`, whose memory is nobody's yet
            self.reset_parameters()
        return self

    def extra_repr(self) -> str:
        """Returns the spec, the sizes and what the config switches on."""
        config = self.config
        parts = [f"{config.spec}", f"heads={self.heads}", f"head_dim={self.head_dim}"]
        parts += [name for name in ("interval", "clamp") if getattr(config, name)]
        parts += [f"row_shift={config.row_shift}"] if config.row_shift != "none" else []
        return ", ".join(parts)


def _learns(name: str) -> bool:
    """Whether a parameter can be trained: the rest is as calibration left it, and what training changes is apart."""
    return not name.endswith(("coefficients", "directions", "radius", "means", "scales", "lengths")) and not (
        name.startswith("refinements.") and name.endswith("center")
    )


def _sizes(part: nn.Module) -> dict[str, torch.Size]:
    """Returns the shapes of a module's tensors; DeepSpeed's ZeRO-3 keeps those of partitioned ones in `ds_shape`."""
    return {name: getattr(tensor, "ds_shape", tensor.shape) for name, tensor in part.state_dict(keep_vars=True).items()}
