"""`PolyAttention`, the child module that each patched attention module carries."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..ops import polynomial_attention
from ..ops.api import autocast_inputs, is_transformed
from ..ops.call import compute_dtype, without_autocast
from ..spec import PolyAttentionConfig, Polynomial
from .recording import is_recorded

CHILD_NAME = "polyattn"


class PolyAttention(nn.Module):
    """The polynomial of one attention module: coefficients, score interval and key shift of each head.

    t_ij = (x_ij − center_h − scaling · q_i·μ_h) / radius_h, in the units of the scaled scores x.

    Attributes:
        coefficients: Parameter (H, P + 1), or (1, P + 1) with granularity `layer`; ascending powers of t.
        center: Parameter (H,); used once `config.interval` is set.
        key_shift: Parameter (H, D), μ_h; used once `config.key_shift` is set.
        radius: buffer (H,), positive; used once `config.interval` is set.
        config: the `PolyAttentionConfig` this module was made from; replaced by calibration.
        observer: while set, the module's attention runs softmax and the observer sees its inputs and output. Of the
            thread that set it: for others the module is as before.

    All four tensors stay float32 when the model is cast to a lower precision.

    Args:
        config: what to be.
        heads: H, query heads.
        head_dim: D, of queries and keys.
        device: of the parameters.
    """

    coefficients: nn.Parameter
    center: nn.Parameter
    key_shift: nn.Parameter
    radius: Tensor

    def __init__(
        self, config: PolyAttentionConfig, heads: int, head_dim: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        self.head_dim = head_dim
        self._observers: dict[int, Callable[..., None]] = {}
        self._looked_at, self._bare = (0, -1), False
        rows = heads if config.granularity == "head" else 1
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.coefficients = nn.Parameter(torch.empty(rows, config.spec.degree + 1, **options))
        self.center = nn.Parameter(torch.empty(heads, **options))
        self.key_shift = nn.Parameter(torch.empty(heads, head_dim, **options))
        self.register_buffer("radius", torch.empty(heads, **options))
        self.configure(config)
        self.reset_parameters()

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
        """Replaces the config and freezes the parameters that it does not use or does not train."""
        self.config = config
        self.coefficients.requires_grad_(config.learnable)
        self.center.requires_grad_(config.learnable and config.interval)
        self.key_shift.requires_grad_(config.learnable and config.key_shift)

    def change_spec(self, spec: Polynomial) -> None:
        """Takes another polynomial, uncalibrated; center, radius and key shift stay as they are."""
        rows, trained = self.coefficients.shape[0], self.coefficients.requires_grad
        self.config = replace(self.config, spec=spec)
        self.coefficients = nn.Parameter(self.coefficients.new_empty(rows, spec.degree + 1), requires_grad=trained)
        self._reset_coefficients()

    @torch.no_grad()
    def _reset_coefficients(self) -> None:
        initial = self.config.spec.initial_coefficients()
        self.coefficients.copy_(self.coefficients.new_tensor(initial).expand_as(self.coefficients))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the spec's uncalibrated coefficients, center 0, radius 1 and no key shift."""
        self._reset_coefficients()
        self.center.zero_()
        self.key_shift.zero_()
        self.radius.fill_(1.0)

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
        center: Tensor | float = self.center if config.interval else 0.0
        if config.key_shift:
            center = self.shifted_center(query, scaling)
        output: Tensor | tuple[Tensor, Tensor] = polynomial_attention(  # type: ignore[call-overload,misc]
            query,
            key,
            value,
            self.coefficients,
            mask=mask,
            ranges=ranges,
            causal=causal,
            window=window,
            scaling=scaling,
            power=config.spec.power,
            normalizer=config.spec.normalizer,
            center=center,
            radius=self.radius if config.interval else 1.0,
            clamp=bool(config.clamp),
            monomial=self._is_monomial(),
            dropout=dropout,
            backend=config.backend,
            return_weights=return_weights,
        )
        return output

    def _is_monomial(self) -> bool:
        """Whether only the highest coefficients are non-zero and no other gets a derivative: kernels then skip them.

        Off the CPU looking waits for the device, so only frozen coefficients are looked at, once for each value.
        """
        c = self.coefficients
        if is_recorded(c) or (c.requires_grad and torch.is_grad_enabled()) or is_transformed(c):
            return False
        if c.device.type == "cpu":
            return not bool(c[:, :-1].any())
        if c.requires_grad or c.is_inference():
            return False
        value = (c.data_ptr(), c._version)
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

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Returns the spec, the sizes and what the config switches on."""
        config = self.config
        parts = [f"{config.spec}", f"heads={self.heads}", f"head_dim={self.head_dim}"]
        parts += [name for name in ("interval", "clamp", "key_shift") if getattr(config, name)]
        return ", ".join(parts)


def is_patched(model: nn.Module) -> bool:
    """Whether any attention module of the model is polynomial."""
    return any(isinstance(module, PolyAttention) for module in model.modules())
