"""`PolyAttention`, the child module that each patched attention module carries."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, PatchError
from ..ops import polynomial_attention, score_moments
from ..ops.api import autocast_inputs, is_transformed
from ..ops.call import compute_dtype, without_autocast
from ..ops.centers import fused_centers
from ..ops.masks import count_visible
from ..ops.moments import moments_of
from ..spec import PolyAttentionConfig, Polynomial
from . import settings
from .recording import is_recorded
from .relative import RelativePolynomial, initial_directions, no_change, warn_of_rounding
from .resuming import mark_untrained
from .row_shift import MomentShift, Refinement, alpha_of, evaluate, shift_modules

CHILD_NAME = "polyattn"
FAR = 2  # times longer than all rows of the calibration, or shorter: then a forward pass warns


class PolyAttention(RelativePolynomial):
    """The polynomial of one attention module: coefficients, score interval and key shift of each head.

    t_ij = (x_ij − center_h − s_i) / radius_h, in the units of the scaled scores x, with the row shift s_i = scaling ·
    q_i·μ_h, what `row_shift.MomentShift` adds to it, and its refinements.

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
        observer: while set, the module's attention runs softmax and the observer sees its inputs and output. Of the
            thread that set it: for others the module is as before.

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
    _warned: bool
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
        self._observers: dict[int, Callable[..., None]] = {}
        self._looked_at: tuple[tuple[int, int], ...] = ()
        self._bare = False
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

    @property
    def observer(self) -> Callable[..., None] | None:
        """The observer of this thread; in a backward pass, which has threads of its own, the only one there is."""
        if not self._observers:
            return None
        if len(self._observers) == 1 and torch._C._current_graph_task_id() != -1:
            return next(iter(self._observers.values()))
        return self._observers.get(threading.get_ident())

    @observer.setter
    def observer(self, observer: Callable[..., None] | None) -> None:
        if observer is None:
            self._observers.pop(threading.get_ident(), None)
        else:
            self._observers[threading.get_ident()] = observer

    def configure(self, config: PolyAttentionConfig) -> None:
        """Replaces the config, and freezes the parameters that it does not use or does not train.

        A frozen polynomial that the config before would have trained was frozen by somebody, and stays so.
        """
        trained = config.learnable and (self.delta.requires_grad or not self.config.learnable)
        self.config = config
        self._warned, self._is_hf_initialized = False, True
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

    def train(self, mode: bool = True) -> PolyAttention:
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

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        ranges: Tensor | None = None,
        causal: bool = False,
        window: int | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns `polynomial_attention` with this module's polynomial; see there for shapes."""
        config = self.config
        if query.shape[1] != self.heads:
            raise PatchError(
                f"this attention module was patched for {self.heads} query heads and now gets {query.shape[1]}; "
                "unpatch the model before changing its heads"
            )
        if config.interval and self.coefficients.dtype in (torch.bfloat16, torch.float16):
            raise PatchError(
                f"the parameters of this polynomial were cast to {self.coefficients.dtype}, one by one, and are not "
                "those that were calibrated any more. Load the model again, cast it as a whole: model.to(dtype) and "
                "from_pretrained(…, dtype=…) leave polynomials in float32."
            )
        self._warn_of_length(key)
        if self.coefficients.requires_grad and not is_recorded(query):  # a model's `requires_grad_(True)`
            self.freeze_unused()
        scaling = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        pattern: dict[str, Any] = {"mask": mask, "ranges": ranges, "causal": causal, "window": window}
        pattern["scaling"] = scaling
        center: Tensor | float = self.center if config.interval else 0.0
        if config.row_shift != "none" or self.refinements:
            center = self.row_centers(query, key, **pattern)
        coefficients = self.changed_coefficients()
        output: Tensor | tuple[Tensor, Tensor] = polynomial_attention(  # type: ignore[call-overload]
            query,
            key,
            value,
            coefficients,
            power=config.spec.power,
            normalizer=config.spec.normalizer,
            center=center,
            radius=self.radius.detach() if config.interval else 1.0,
            clamp=bool(config.clamp),
            monomial=self._is_monomial(coefficients),
            dropout=dropout,
            backend=config.backend,
            return_weights=return_weights,
            **pattern,
        )
        return output

    def row_centers(
        self,
        query: Tensor,
        key: Tensor,
        *,
        mask: Tensor | None = None,
        ranges: Tensor | None = None,
        causal: bool = False,
        window: int | None = None,
        scaling: float,
    ) -> Tensor:
        """Returns center_h + s_i, (B, H, Tq), float32 (float64 for float64 queries); arguments as of `forward`."""
        pattern: dict[str, Any] = {"mask": mask, "ranges": ranges, "causal": causal, "window": window}
        alpha, moments, backend = alpha_of(self.config.spec.normalizer), self.moments, self.config.backend
        fused: tuple[Any, ...] = () if moments is None else (moments.tensors, partial(moments.weighed, alpha))
        center = fused_centers(
            query, key, self.center, self.key_shift, *fused, scaling=scaling, backend=backend, **pattern
        )
        if center is None:
            center = self.shifted_center(query, scaling)
            if moments is not None:
                count = count_visible(query.shape[2], key.shape[2], query.device, **pattern)
                mean, variance = score_moments(query, key, scaling=scaling, backend=backend, **pattern)
                (rounded,) = autocast_inputs(query)
                with without_autocast(query.device):
                    center = center + moments(scaling * rounded.to(center.dtype), mean, variance, count, alpha)
        for part in self._refinements():
            center = center + part.step(self._row_sum(part, query, key, center, pattern | {"scaling": scaling}))
        return center

    def _warn_of_length(self, key: Tensor) -> None:
        """Warns once where sequences are far longer or shorter than those of the calibration."""
        lengths = self.config.lengths
        if lengths is None or is_recorded(key) or self._warned:
            return
        if not lengths[0] <= FAR * key.shape[2] <= FAR * FAR * lengths[1]:
            self._warned = True
            warnings.warn(
                f"a sequence has {key.shape[2]} keys, but this model was calibrated on rows of {lengths[0]} to "
                f"{lengths[1]}: what it computes there is not measured. Look with diagnose(model, batches) whether its "
                "outputs are softmax's still, or calibrate on such sequences.",
                stacklevel=2,
            )

    def _refinements(self) -> Iterator[Refinement]:
        for part in self.refinements or ():
            assert isinstance(part, Refinement)
            yield part

    def centers_of(self, query: Tensor, scores: Tensor, visible: Tensor, scaling: float) -> Tensor:
        """Returns what `row_centers` does, for chosen rows whose scores are at hand.

        Args:
            query: (B, H, rows, D), float32 or float64.
            scores: scaled, (B, H, rows, Tk).
            visible: bool, broadcastable to them.
            scaling: of the scores.
        """
        spec = self.config.spec
        center, alpha = self.shifted_center(query, scaling), alpha_of(spec.normalizer)
        count = visible.sum(-1).clamp(min=1)
        moments = self.moments
        if moments is not None:
            center = center + moments(scaling * query, *moments_of(scores, visible, count), count, alpha)
        for part in self._refinements():
            t = scores - (center + part.center.to(center.dtype)[:, None]).unsqueeze(-1)
            t = t / part.radius.to(t.dtype)[:, None, None]
            w = evaluate(spec, part.changed_coefficients(), t.clamp(-1.0, 1.0) if self.config.clamp else t)
            row_sum = w.masked_fill(~visible, 0.0).sum(-1) * count.to(t.dtype) ** -alpha
            center = center + part.step(row_sum)
        return center

    def _row_sum(self, part: Refinement, query: Tensor, key: Tensor, center: Tensor, pattern: dict[str, Any]) -> Tensor:
        """Returns r_i Σ_j p(t_ij) of a refinement's polynomial, (B, H, Tq), in the dtype of the centers."""
        spec = self.config.spec
        with without_autocast(query.device):
            output: Tensor = polynomial_attention(
                query,
                key,
                key.new_ones(*key.shape[:3], 1),
                part.changed_coefficients(),
                power=spec.power,
                normalizer="none" if spec.normalizer == "l1" else spec.normalizer,
                center=center + part.center.to(center.dtype)[:, None],
                radius=part.radius,
                clamp=bool(self.config.clamp),
                backend=self.config.backend,
                **pattern,
            )
        return output.squeeze(-1).transpose(1, 2).to(center.dtype)

    def _is_monomial(self, c: Tensor) -> bool:
        """Whether only the highest coefficients are non-zero and no other gets a derivative: kernels then skip them.

        Off the CPU looking waits for the device, so only frozen coefficients are looked at, once for each value.

        Args:
            c: the coefficients of p.
        """
        if is_recorded(c) or (c.requires_grad and torch.is_grad_enabled()) or is_transformed(c):
            return False
        if c.device.type == "cpu":
            return not bool(c[:, :-1].any())
        parts = self.coefficients, self.delta
        if self.delta.requires_grad or any(part.is_inference() for part in parts):
            return False
        value = tuple((part.data_ptr(), part._version) for part in parts)
        if self._looked_at != value:
            self._looked_at, self._bare = value, not bool(c[:, :-1].any())
        return self._bare

    def shifted_center(self, query: Tensor, scaling: float) -> Tensor:
        """Returns center_h + scaling · q_i·μ_h, (B, H, Tq), float32 (float64 for float64 queries).

        Of the query as autocast rounds it: the score has the same rounding, and the difference is small.
        """
        (query,) = autocast_inputs(query)
        dtype = compute_dtype(query.dtype)
        with without_autocast(query.device):
            # A matrix product would first copy queries whose heads lie inside of tokens.
            shift = torch.linalg.vecdot(query.to(dtype), self.key_shift.to(dtype)[:, None])
            center: Tensor = self.center.to(dtype)[:, None] + scaling * shift
            return center

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PolyAttention:
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


def is_patched(model: nn.Module) -> bool:
    """Whether any attention module of the model is polynomial."""
    return any(isinstance(module, PolyAttention) for module in model.modules())
