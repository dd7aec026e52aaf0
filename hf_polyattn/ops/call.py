"""One validated call of the operator, as every backend receives it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Added to the row sum of normalizer l1.
EPSILON = 1e-37
# r_i = n_i ^ exponent, for every normalizer but l1.
ROW_EXPONENTS = {"rsqrt": -0.5, "mean": -1.0, "none": 0.0}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of scores and row scales for operands of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context in which nothing is cast; devices such as meta know no autocast."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device_type=device.type, enabled=False) if available else nullcontext()


def empty_gradient(operand: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns an uninitialised tensor for the gradient of an operand, with contiguous columns.

    It lies in memory as the operand does, heads inside or outside of tokens: otherwise autograd, or the projection that
    comes before the attention, would copy it.
    """
    gradient = torch.empty_like(operand, dtype=dtype)
    return gradient if gradient.stride(-1) == 1 else gradient.new_empty(gradient.shape)


@dataclass(frozen=True, slots=True)
class Call:
    """Tensors and settings of one call. B batch, H heads, G key/value heads, Tq, Tk, D head dim, P degree.

    Attributes:
        query: (B, H, Tq, D).
        key: (B, G, Tk, D); H is a multiple of G, query head h reads key head h // (H / G).
        value: (B, G, Tk, Dv).
        coefficients: (H, P + 1), ascending powers of t.
        mask: bool (B or 1, H or 1, Tq or 1, Tk), True = visible; None where all is visible.
        ranges: int32 (B or 1, Tq or 1, 2), the start and stop of the keys that a row may see; None for all.
        center: (B, H, Tq) or None for 0.
        radius: (H,) or None for 1.
        seed: int64 (1,) when attention weights are dropped, else None.
        causal, window: the pattern of `hf_polyattn.ops.masks.band`.
        monomial: all coefficients but the highest are 0, and need no gradient.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    coefficients: Tensor
    mask: Tensor | None
    ranges: Tensor | None
    center: Tensor | None
    radius: Tensor | None
    seed: Tensor | None
    causal: bool
    window: int | None
    scaling: float
    power: int
    normalizer: str
    clamp: bool
    monomial: bool
    dropout: float

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of scores and row scales."""
        return compute_dtype(self.query.dtype)

    @property
    def is_empty(self) -> bool:
        """Whether no query meets a key, or nothing comes of it; the results are zeros then."""
        return 0 in (*self.query.shape, *self.key.shape, *self.value.shape)

    def zero_results(self) -> tuple[Tensor, Tensor]:
        """Returns zeros for the output and the row scale, as `library` says."""
        batch, heads, q_len, _ = self.query.shape
        output = self.query.new_zeros((batch, q_len, heads, self.value.shape[3]))
        rows = (batch, heads, q_len) if self.normalizer == "l1" else (0,)
        return output, output.new_zeros(rows, dtype=self.compute_dtype)

    def zero_gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns zeros for the gradients of query, key, value, coefficients and center, as `library` says."""
        query, key, value = (empty_gradient(operand).zero_() for operand in (self.query, self.key, self.value))
        coefficients = self.coefficients.new_zeros(self.coefficients.shape)
        center = coefficients if self.center is None else self.center
        shape = (0,) if self.center is None else self.center.shape
        return query, key, value, coefficients, center.new_zeros(shape)
