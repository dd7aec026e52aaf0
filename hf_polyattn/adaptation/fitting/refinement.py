"""A refinement of the row shift: what a polynomial's row sums at the predicted shift tell of what is left of s_i."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...ops.module import ROW_SUMS, STEPS
from ...patching.row_shift import Refinement, evaluate, step
from ...spec import Polynomial
from .interval import Intervals
from .regression import Regression
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
        self._regression = Regression.zeros(len(coefficients), STEPS, coefficients.device)

    def row_sums(self, rows: Rows, shifted: Tensor) -> Tensor:
        """Returns S_i of shifted scores, (b, H, Tq)."""
        w = evaluate(self.spec, self.coefficients[:, None, None], self.interval.arguments(shifted, 0))
        return (w * rows.visible).sum(-1) * rows.fixed_scale(self.spec.normalizer)

    def see(self, rows: Rows, shifted: Tensor) -> None:
        """Adds rows to the regression of what their shift leaves."""
        left = self.shift.target(rows) - (rows.scores - shifted)[..., 0]
        z = (self.row_sums(rows, shifted).clamp(*ROW_SUMS) - 1.0).double()
        self._regression.add(_powers(z), left, rows.weight)

    def solve(self) -> None:
        """Solves for the step."""
        sums = self._regression
        ends = [math.log10(end) for end in ROW_SUMS]
        s = torch.logspace(ends[0], ends[1], 32, dtype=torch.float64, device=sums.gram.device)
        x, y, weight = _powers(s - 1.0), s.log(), _PRIOR * sums.count / len(s)
        self.steps = solve(sums.gram + weight * x.T @ x, sums.moment + weight * x.T @ y, ridge=_RIDGE)
        self.residual = sums.error(self.steps).sqrt()

    def of(self, rows: Rows, shifted: Tensor) -> Tensor:
        """Returns the step of each row, (b, H, Tq)."""
        return step(self.row_sums(rows, shifted), self.steps.to(shifted.dtype))

    def write(self, module: Refinement, top: Tensor, radius: Tensor) -> None:
        """Copies this refinement into a module, whose attention has the interval [top − 2 · radius, top], (H,) each."""
        tops, radii = self.interval.tops[0], self.interval.widths[0] / 2.0
        module.set_coefficients(self.coefficients[: module.coefficients.shape[0]], self.spec)
        module.steps.copy_(self.steps)
        module.center.copy_((tops - radii) - (top - radius))
        module.radius.copy_(radii)


def _powers(z: Tensor) -> Tensor:
    """Returns 1, z, z² …, what a step is linear in, in a new last dimension."""
    return z.unsqueeze(-1) ** torch.arange(STEPS, device=z.device)
