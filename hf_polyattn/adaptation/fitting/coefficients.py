"""The coefficients of a polynomial on each interval that is tried: one class a kind of spec, and `fit_of` to choose.

A fit asks for passes over all rows: `passes` yields (a title, what sees the rows and their shifted scores), and goes on
once that has seen all of them. Afterwards the fit has the intervals that are left, their coefficients and their errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ...spec import PolyAttentionConfig
from .errors import MeasuredErrors, Target, comparable, squared_error
from .interval import Intervals, grouped, take
from .normal_equations import NormalEquations
from .rows import Rows
from .solves import exponential_fit, quadratic, solve, solve_ratio

RATIO_ROUNDS = 3
RATIO_CANDIDATES = 2  # intervals kept after the first round of the ratio fit

See = Callable[[Rows, Tensor], None]


class CoefficientFit(Protocol):
    """What every fit has once its passes are over: candidates to choose from.

    Attributes:
        intervals: C of each head.
        coefficients: (C, H, K).
        errors: Σ‖out − softmax‖² over all rows, (C, H).
        target: softmax's outputs.
    """

    intervals: Intervals
    coefficients: Tensor
    errors: Tensor
    target: Target

    def passes(self) -> Iterator[tuple[str, See]]:
        """Yields what has to see all rows next, and its title."""


def fit_of(config: PolyAttentionConfig, intervals: Intervals) -> CoefficientFit:
    """Returns the fit for a config's spec: of powers, with a row sum, or linear."""
    if config.spec.power > 1:
        return PowerFit(config, intervals)
    return RatioFit(config, intervals) if config.spec.normalizer == "l1" else LinearFit(config, intervals)


class LinearFit:
    """Fixed normalizers: linear least squares of o_i on r_i F_k(i), F_k(i) = Σ_j m_ij t_ij^k v_j.

    In float64 where the scores are: errors follow from these sums, and float32 would favour intervals that are far too
    wide for a head's scores, by what it rounds.
    """

    def __init__(self, config: PolyAttentionConfig, intervals: Intervals) -> None:
        self.config, self.intervals = config, intervals
        self.target = Target(intervals.tops)
        self._equations = NormalEquations(config, intervals)

    def passes(self) -> Iterator[tuple[str, See]]:
        """Yields one pass; the errors follow from its sums."""
        yield "coefficients 1", self.see
        self.solve()

    def see(self, rows: Rows, shifted: Tensor) -> None:
        """Adds rows to the normal equations of every candidate."""
        target = rows.grouped(self.target.see(rows))
        scale = rows.grouped(rows.weight * rows.fixed_scale(self.config.spec.normalizer))[..., None, :, None]
        for candidates in self._equations.parts(shifted):
            f, _ = self._equations.features(rows, shifted, candidates)
            self._equations.add(candidates, f.mul_(scale), target=target)

    def solve(self) -> None:
        """Solves the normal equations."""
        equations = self._equations
        self.coefficients = solve(*equations.pooled())
        output_square = quadratic(self.coefficients, equations.matrix)
        product = (self.coefficients * equations.linear).sum(-1)
        self.errors = squared_error(output_square, product, self.target.square)


class RatioFit:
    """A row sum: rounds of minimising Σ_i ‖Σ_k c_k (F_k − o S_k)‖² / Z_i², Z_i of the round before.

    No round may lose what an earlier one had: of all rounds the coefficients with the smallest error stay.
    """

    def __init__(self, config: PolyAttentionConfig, intervals: Intervals) -> None:
        self.config, self.intervals = config, intervals
        self.coefficients = intervals.tops.new_zeros(*intervals.tops.shape, config.spec.degree + 1)
        self.errors = torch.full_like(intervals.tops, torch.inf)

    def passes(self) -> Iterator[tuple[str, See]]:
        """Yields a pass for each round and one that measures, after the first round and the last."""
        equations = _RatioEquations(self.config, self.intervals)
        yield "coefficients 1", equations.see
        latest = equations.solve()
        # The objective does not tell which interval is good: it weighs a row by Σ_k c_k S_k / Z, near 0 where c
        # neglects the row.
        measured = MeasuredErrors(self.config.spec, self.intervals, latest)
        yield "intervals", measured.see
        self._remember(latest, measured.errors())
        latest = self._keep_best(latest)
        for number in range(2, RATIO_ROUNDS + 1):
            equations = _RatioEquations(self.config, self.intervals, latest)
            yield f"coefficients {number}", equations.see
            if number > 2:  # with Z_i their own, the quadratic form is the error of the latest coefficients
                self._remember(latest, quadratic(latest, equations.matrix))
            latest = equations.solve()
        measured = MeasuredErrors(self.config.spec, self.intervals, latest)
        yield "choice", measured.see
        self._remember(latest, measured.errors())
        self.coefficients, self.target = _of_size_one(self.coefficients), measured.target

    def _remember(self, coefficients: Tensor, errors: Tensor) -> None:
        """Keeps the coefficients where their errors, (C, H), are the lowest so far."""
        better = comparable(errors, self.config) < comparable(self.errors, self.config)
        self.coefficients = torch.where(better.unsqueeze(-1), coefficients, self.coefficients)
        self.errors = torch.where(better, errors, self.errors)

    def _keep_best(self, latest: Tensor) -> Tensor:
        """Goes on with the best intervals of each head, and returns the latest coefficients there."""
        kept = comparable(self.errors, self.config).argsort(0)[:RATIO_CANDIDATES]
        self.intervals = self.intervals.take(kept)
        self.coefficients, self.errors = take(self.coefficients, kept), take(self.errors, kept)
        return take(latest, kept)


class PowerFit:
    """Powers: p is a fit to exp((x − top) / s) on each interval, and the data choose the interval only."""

    def __init__(self, config: PolyAttentionConfig, intervals: Intervals) -> None:
        self.config, self.intervals = config, intervals
        spec = config.spec
        below = torch.zeros_like(intervals.widths) if intervals.below is None else intervals.below
        sizes = torch.stack([intervals.widths, below], -1).flatten(0, 1) / spec.power
        different, which = torch.unique(sizes, dim=0, return_inverse=True)  # with a clamp heads share their widths
        fitted = torch.stack([exponential_fit(spec.degree, *size) for size in different.tolist()])
        self.coefficients = fitted.to(intervals.tops)[which].reshape(*intervals.tops.shape, -1)

    def passes(self) -> Iterator[tuple[str, See]]:
        """Yields one pass, which measures."""
        measured = MeasuredErrors(self.config.spec, self.intervals, self.coefficients)
        yield "choice", measured.see
        self.target = measured.target
        if self.config.spec.normalizer == "l1":
            self.coefficients, self.errors = _of_size_one(self.coefficients), measured.errors()
            return
        # right up to a factor: that of least squares, put inside the power
        gain = (measured.product / measured.output_square.clamp(min=1e-300)).clamp(min=1e-300)
        self.errors = (self.target.square - measured.product * gain).nan_to_num(nan=torch.inf)
        self.coefficients = self.coefficients * gain.pow(1.0 / self.config.spec.power).unsqueeze(-1)


def _of_size_one(coefficients: Tensor) -> Tensor:
    """Returns them with a largest magnitude of 1, which a row sum does not see."""
    return coefficients / coefficients.abs().amax(-1, keepdim=True)


class _RatioEquations(NormalEquations):
    """Those of one round of the ratio fit: g_k = (F_k − o S_k) / Z_i, beside Σ_i S_k(i) / Z_i.

    Z_i is softmax's partition sum, or that of the coefficients of the round before. In float32: errors are measured.
    """

    def __init__(self, config: PolyAttentionConfig, intervals: Intervals, before: Tensor | None = None) -> None:
        super().__init__(config, intervals, from_below=True)
        self.before = before
        self._tops, self._top_of = torch.unique_consecutive(intervals.tops, dim=0, return_inverse=True)

    def see(self, rows: Rows, shifted: Tensor) -> None:
        """Adds rows to the equations of every candidate."""
        softmax = self._softmax_sums(rows, shifted) if self.before is None else None
        weight, target = rows.grouped(rows.weight).float(), rows.grouped(rows.target.float()).unsqueeze(4)
        shifted = shifted.float()
        for candidates in self.parts(shifted):
            f, s = self.features(rows, shifted, candidates)
            z = self._own_sums(s, candidates) if softmax is None else softmax[:, :, self._top_of[candidates]]
            scale = (weight / z).unsqueeze(4)
            s_scaled = (s * scale).double().sum(-1)
            f.sub_(target * s.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
            self.add(candidates, f, s_scaled)

    def _softmax_sums(self, rows: Rows, shifted: Tensor) -> Tensor:
        """Returns softmax's Z_i from each different top, (b, G, tops, H / G, Tq)."""
        left = rows.log_partition_sums() - (rows.scores[..., 0] - shifted[..., 0])
        tops = grouped(self._tops, rows.value.shape[1]).squeeze(-1)
        return (rows.grouped(left) - tops).exp_().clamp_(min=1e-30, max=1e30).float()

    def _own_sums(self, s: Tensor, candidates: slice) -> Tensor:
        """Returns |Z_i| of the coefficients before, (b, G, C, H / G, Tq)."""
        assert self.before is not None
        c = self.of_u(self.before[candidates]).to(s.dtype)
        c = c.reshape(len(c), s.shape[1], -1, c.shape[-1]).transpose(0, 1)  # (G, C, H / G, K)
        z: Tensor = (c.unsqueeze(-2) @ s).squeeze(-2)
        return z.abs().clamp(min=1e-30)

    def solve(self) -> Tensor:
        """Returns the coefficients, (C, H, K)."""
        return solve_ratio(*self.pooled())
