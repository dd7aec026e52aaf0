"""`PolyAttention`, the child module that each patched attention module carries."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..ops import polynomial_attention, score_moments
from ..ops.call import compute_dtype, without_autocast
from ..ops.centers import fused_centers
from ..ops.layer import fused_layer
from ..ops.masks import count_visible, longest_visible
from ..ops.modes import autocast_inputs, is_transformed
from ..ops.module import MOMENTS, POLYNOMIAL, REFINEMENT
from ..ops.moments import moments_of
from ..spec import NORMALIZERS, PolyAttentionConfig
from .configured import ConfiguredPolynomial
from .recording import is_recorded
from .relative import fixed
from .row_shift import Refinement, alpha_of, evaluate

CHILD_NAME = "polyattn"
FAR = 2  # times longer than all rows of the calibration, or shorter: then a forward pass warns


class PolyAttention(ConfiguredPolynomial):
    """The polynomial of one attention module: coefficients, score interval and key shift of each head.

    t_ij = (x_ij − center_h − s_i) / radius_h, in the units of the scaled scores x, with the row shift s_i = scaling ·
    q_i·μ_h, what `row_shift.MomentShift` adds to it, and its refinements.

    Attributes:
        observer: while set, the module's attention runs softmax and the observer sees its inputs and output. Of the
            thread that set it: for others the module is as before.

    Its tensors and arguments are those of a `ConfiguredPolynomial`.
    """

    _warned: bool

    def __init__(
        self, config: PolyAttentionConfig, heads: int, head_dim: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__(config, heads, head_dim, device)
        self._observers: dict[int, Callable[..., None]] = {}
        self._looked_at: tuple[tuple[int, int], ...] = ()
        self._bare = False

    def configure(self, config: PolyAttentionConfig) -> None:
        """Replaces the config, see `ConfiguredPolynomial`; its lengths are warned of again."""
        super().configure(config)
        self._warned = False

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
        scaling = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
        pattern: dict[str, Any] = {"mask": mask, "ranges": ranges, "causal": causal, "window": window}
        pattern["scaling"] = scaling
        if not return_weights and not torch.compiler.is_compiling():
            at_once = self._at_once(query, key, value, pattern, dropout)
            if at_once is not None:
                self._warn_of_length(query, key, pattern)
                return at_once
        if config.interval and self.coefficients.dtype in (torch.bfloat16, torch.float16):
            raise PatchError(
                f"the parameters of this polynomial were cast to {self.coefficients.dtype}, one by one, and are not "
                "those that were calibrated any more. Load the model again, cast it as a whole: model.to(dtype) and "
                "from_pretrained(…, dtype=…) leave polynomials in float32."
            )
        if not is_recorded(key):
            self._warn_of_length(query, key, pattern)
            c = self.coefficients
            if c.requires_grad and c.is_leaf and not is_transformed(c):  # a model's `requires_grad_(True)` reached it
                self.freeze_unused()
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

    def _at_once(
        self, query: Tensor, key: Tensor, value: Tensor, pattern: dict[str, Any], dropout: float
    ) -> Tensor | None:
        """Returns the output as one kernel gives it, see `fused_layer`; None where something wraps the parameters.

        Also where somebody asked for a gradient that there is none of, which `forward` takes back.
        """
        config, spec = self.config, self.config.spec
        moves = config.row_shift != "none" or spec.refinements > 0
        shift: list[Tensor] = []
        refinements: list[Tensor] = []
        try:
            polynomial = _held(self, POLYNOMIAL)
            if moves:
                shift += _held(self, ("key_shift",))
            if config.row_shift == "moments":
                shift += _held(self.moments, MOMENTS)
            if spec.refinements:
                refinements = [tensor for part in self._refinements() for tensor in _held(part, REFINEMENT)]
        except KeyError:
            return None
        if polynomial[0].dtype != torch.float32 or polynomial[0].requires_grad:
            return None
        return fused_layer(
            query,
            key,
            value,
            polynomial,
            shift,
            refinements,
            power=spec.power,
            normalizer=NORMALIZERS.index(spec.normalizer),
            clamp=bool(config.clamp),
            interval=config.interval,
            alpha=alpha_of(spec.normalizer),
            dropout=dropout,
            backend=config.backend,
            **pattern,
        )

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

    def _warn_of_length(self, query: Tensor, key: Tensor, pattern: dict[str, Any]) -> None:
        """Warns once where rows see far more or fewer keys than those of the calibration."""
        lengths = self.config.lengths
        if lengths is None or self._warned:
            return
        k_len = key.shape[2]
        if k_len > FAR * lengths[1]:  # it may be padding, or a static cache
            seen = {name: pattern[name] for name in ("mask", "ranges", "causal", "window")}
            k_len = longest_visible(query.shape[2], k_len, key.device, **seen)
        if not lengths[0] <= FAR * k_len <= FAR * FAR * lengths[1]:
            self._warned = True
            warnings.warn(
                f"a sequence has {k_len} keys, but this model was calibrated on rows of {lengths[0]} to "
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
            t = scores - (center + fixed(part.center).to(center.dtype)[:, None]).unsqueeze(-1)
            t = t / fixed(part.radius).to(t.dtype)[:, None, None]
            w = evaluate(
                spec, part.changed_coefficients()[:, None, None], t.clamp(-1.0, 1.0) if self.config.clamp else t
            )
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
                center=center + fixed(part.center).to(center.dtype)[:, None],
                radius=fixed(part.radius),
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


def _held(module: Any, names: Sequence[str]) -> list[Tensor]:
    """Returns parameters as a module holds them; KeyError for one that a wrapper or a parametrization took away."""
    parameters = module._parameters
    return [parameters[name] for name in names]


def is_patched(model: nn.Module) -> bool:
    """Whether any attention module of the model is polynomial."""
    return any(isinstance(module, PolyAttention) for module in model.modules())
