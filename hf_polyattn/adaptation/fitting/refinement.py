"""A refinement of the row shift: what a polynomial's row sums at the predicted shift tell of what is left of s_i."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...patching.row_shift import ROW_SUMS, STEPS, Refinement, evaluate, step
from ...spec import Polynomial
from .interval import Intervals
from .row_shift import RowShift
from .rows import Rows
from .solves import solve

_RIDGE = 1e-6
# Of the weight of all rows, that holds the step to log S where rows are few: a polynomial of degree 4 runs away there.
_PRIOR = 0.02


class FittedRefinement:
    """A polynomial on its interval and the step of its row sums S_i: the regression of s_i on powers of S_i − 1.

    Args:
        spec: of the polynomial, with a fixed normalizer.
        interval: one of each head.
        coefficients: (H, K).
        shift: the prediction that it goes with.

    Attributes:
        residual: standard deviation of what is left of s_i, nats, (H,); once solved.
    """

    residual: Tensor

    def __init__(self, spec: Polynomial, interval: Intervals, coefficients: Tensor, shift: RowShift) -> None:
        self.spec, self.interval, self.coefficients, self.shift = spec, interval, coefficients, shift
        heads = len(coefficients)
        self._gram = coefficients.new_zeros(heads, STEPS, STEPS)
        self._moment, self._square = self._gram[..., 0].clone(), self._gram[:, 0, 0].clone()
        self._count = 0.0

    def row_sums(self, rows: Rows, shifted: Tensor) -> Tensor:
        """Returns S_i of shifted scores, (b, H, Tq)."""
        w = evaluate(self.spec, self.coefficients, self.interval.arguments(shifted, 0))
        return (w * rows.visible).sum(-1) * rows.fixed_scale(self.spec.normalizer)

    def see(self, rows: Rows, shifted: Tensor) -> None:
        """Adds rows to the regression of what their shift leaves."""
        left = (self.shift.target(rows) - (rows.scores - shifted)[..., 0]) * rows.weight
        z = (self.row_sums(rows, shifted).clamp(*ROW_SUMS) - 1.0).double()
        x = z.unsqueeze(-1) ** torch.arange(STEPS, device=z.device) * rows.weight.unsqueeze(-1)
        self._gram += torch.einsum("bhti,bhtj->hij", x, x)
        self._moment += torch.einsum("bhti,bht->hi", x, left.double())
        self._square += left.double().square().sum((0, 2))
        self._count += float(rows.weight[:, 0].sum())

    def solve(self) -> None:
        """Solves for the step."""
        s = torch.logspace(
            math.log10(ROW_SUMS[0]), math.log10(ROW_SUMS[1]), 32, dtype=torch.float64, device=self._gram.device
        )
        x = (s.unsqueeze(-1) - 1.0) ** torch.arange(STEPS, device=s.device) * (_PRIOR * self._count / len(s)) ** 0.5
        y = s.log() * (_PRIOR * self._count / len(s)) ** 0.5
        self.steps = solve(self._gram + x.T @ x, self._moment + x.T @ y, ridge=_RIDGE)
        explained = (self.steps * (2.0 * self._moment - (self._gram @ self.steps.unsqueeze(-1)).squeeze(-1))).sum(-1)
        self.residual = ((self._square - explained) / self._count).clamp(min=0.0).sqrt()

    def of(self, rows: Rows, shifted: Tensor) -> Tensor:
        """Returns the step of each row, (b, H, Tq)."""
        return step(self.row_sums(rows, shifted), self.steps.float())

    def write(self, module: Refinement, top: Tensor, radius: Tensor) -> None:
        """Copies this refinement into a module, whose attention has the interval [top − 2 · radius, top], (H,) each."""
        tops, radii = self.interval.tops[0], self.interval.widths[0] / 2.0
        module.coefficients.copy_(self.coefficients[: module.coefficients.shape[0]])
        module.steps.copy_(self.steps)
        module.center.copy_((tops - radii) - (top - radius))
        module.radius.copy_(radii)
