"""The sums that a linear regression for each head is solved from, and how far a solution is off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .solves import quadratic


@dataclass(slots=True)
class Regression:
    """Sums over rows of features x and of what they are to predict, y; float64.

    Attributes:
        gram: Σ x xᵀ, (H, F, F).
        moment: Σ x y, (H, F).
        square: Σ y², (H,).
        count: rows.
    """

    gram: Tensor
    moment: Tensor
    square: Tensor
    count: float = 0.0

    @classmethod
    def zeros(cls, heads: int, size: int, device: torch.device) -> Regression:
        """Returns the sums of no row."""
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        gram = torch.zeros(heads, size, size, **options)
        return cls(gram, torch.zeros(heads, size, **options), torch.zeros(heads, **options))

    def add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Adds rows: x (b, H, Tq, F), y and weight (b, H, Tq)."""
        x, y = (rows_of_heads(part) for part in (x * weight.unsqueeze(-1), (y.double() * weight).unsqueeze(-1)))
        self.gram += x.mT @ x
        self.moment += (x.mT @ y).squeeze(-1)
        self.square += y.square().sum((1, 2))
        self.count += float(weight[:, 0].sum())

    def __add__(self, other: Regression) -> Regression:
        count = self.count + other.count
        return Regression(self.gram + other.gram, self.moment + other.moment, self.square + other.square, count)

    def error(self, solution: Tensor) -> Tensor:
        """Returns the mean square of y − x·solution, (H,), of weights (H, F)."""
        explained = 2.0 * (solution * self.moment).sum(-1) - quadratic(solution, self.gram)
        return ((self.square - explained) / max(self.count, 1.0)).clamp(min=0.0)


def rows_of_heads(x: Tensor) -> Tensor:
    """Returns (b, H, Tq, F) as float64 (H, b · Tq, F)."""
    return x.transpose(0, 1).flatten(1, 2).double()
