"""The row shift s_i: where the scores of a row have to be moved so that one polynomial is exp on all rows of a head.

softmax_ij = exp(x_ij − lse_i) = r_i · exp(x_ij − s_i) with s_i = lse_i − α log n_i, for the fixed r_i = n_i^(−α). The
polynomial cannot have lse_i, so s_i is predicted from what it can have: `patching.row_shift` says from what, and the
weights are solved for here. Where the data leave a weight open it is that of the cumulants, lse ≈ log n + m + v / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.module import FEATURES
from ...patching.core import PolyAttention
from ...patching.row_shift import MomentShift, features
from ...spec import RowShift as Kind
from .regression import Regression, rows_of_heads
from .rows import Rows
from .solves import Factored

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # of the variance of a feature, that are tried on rows held out
HELD_OUT = 4  # of so many batch entries one is held out
_LEAST_VARIANCE = 1e-8  # of a feature, over its mean square, below which nothing is learned from it
_M, _V, _LOG_N = (FEATURES.index(name) for name in ("m", "v", "log n"))


@dataclass(frozen=True, slots=True)
class Predictor:
    """What s_i is predicted from: `kind` is a `row_shift` of `PolyAttentionConfig`, with its squares."""

    kind: Kind
    squares: int = 0


class RowShift:
    """A prediction of s_i for each head, linear in features of the row.

    Args:
        heads: H.
        head_dim: D, of the queries.
        alpha: of the normalizer.
        device: of the sums.

    Attributes:
        count: rows that were seen.
        residual: standard deviation of what the prediction leaves of s_i, nats, (H,); once solved.
        spread: the same of no prediction but a constant.
        predictor: that was solved for.
    """

    residual: Tensor
    spread: Tensor
    predictor: Predictor

    def __init__(self, heads: int, head_dim: int, alpha: float, device: torch.device) -> None:
        self.heads, self.head_dim, self.alpha, self.device = heads, head_dim, alpha, device
        self.squares = torch.zeros(heads, 0, head_dim, device=device)
        self.lengths = [torch.inf, 0.0]
        self._restart()

    def _restart(self) -> None:
        size = 2 * self.head_dim + len(FEATURES) + self.squares.shape[1] + 1
        self._fitted, self._held_out = (Regression.zeros(self.heads, size, self.device) for _ in range(2))
        self._entries = 0
        self._errors: dict[Predictor, tuple[float, float]] = {}

    @property
    def count(self) -> float:
        """Rows that were seen."""
        return self._fitted.count + self._held_out.count

    def see(self, rows: Rows) -> None:
        """Adds rows to the regression of s_i on all features."""
        x, y = self._features(rows), self.target(rows)
        real = rows.weight[:, :1] > 0
        counts = rows.count.expand_as(rows.weight)[:, :1][real]
        if counts.numel():
            self.lengths = [min(self.lengths[0], float(counts.min())), max(self.lengths[1], float(counts.max()))]
        numbers = rows.entries
        if numbers is None:
            numbers = torch.arange(self._entries, self._entries + len(x), device=x.device)
        self._entries += len(x)
        held_out = numbers % HELD_OUT == HELD_OUT - 1
        for sums, part in ((self._fitted, ~held_out), (self._held_out, held_out)):
            if bool(part.any()):
                sums.add(x[part], y[part], rows.weight[part])

    def target(self, rows: Rows) -> Tensor:
        """Returns s_i, (b, H, Tq)."""
        return rows.log_partition_sums() - self.alpha * rows.count.log()

    def _features(self, rows: Rows) -> Tensor:
        """Returns x_i, (b, H, Tq, 2 D + 8 + R + 1): scaled query, log n times it, φ of `patching.row_shift`, 1."""
        query = rows.query.to(rows.scores.dtype) * rows.scaling
        found = features(query, *rows.moments(), rows.count, self.squares.to(query.dtype))
        return torch.cat([query, found[..., _LOG_N, None] * query, found, torch.ones_like(found[..., :1])], -1)

    def _used(self, predictor: Predictor) -> Tensor:
        """Returns which features a predictor looks at, bool (F,)."""
        used = torch.ones(self._fitted.moment.shape[1], dtype=torch.bool, device=self.device)
        if predictor.kind != "moments":
            used[self.head_dim : -1] = False
        if predictor.kind == "none":
            used[: self.head_dim] = False
        if not predictor.squares:
            used[2 * self.head_dim + len(FEATURES) : -1] = False
        return used

    def _prior(self, predictor: Predictor) -> Tensor:
        """Returns the weights that hold where the data say nothing, (F,)."""
        weights = torch.zeros(self._fitted.moment.shape[1], dtype=torch.float64, device=self.device)
        if predictor.kind == "moments":
            place = 2 * self.head_dim
            weights[place + _M], weights[place + _V], weights[place + _LOG_N] = 1.0, 0.5, 1.0 - self.alpha
        return weights

    def _solver(self, sums: Regression, predictor: Predictor) -> Callable[[float], Tensor]:
        """Returns what gives the weights, (H, F), for a ridge."""
        base = self._prior(predictor)
        moment = sums.moment - sums.gram @ base
        mean = sums.gram[..., -1] / sums.count
        covariance = sums.gram - sums.count * mean.unsqueeze(-1) * mean.unsqueeze(-2)
        product = moment - moment[:, -1:] * mean
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        least = _LEAST_VARIANCE * sums.gram.diagonal(dim1=-2, dim2=-1)
        learned = (variance > least) & self._used(predictor)  # (H, F); the constant varies nowhere
        factored = Factored(covariance * learned.unsqueeze(-1) * learned.unsqueeze(-2))

        def solve(ridge: float) -> Tensor:
            solution = factored.solve(product * learned, ridge) * learned
            solution[:, -1] = moment[:, -1] / sums.count - (solution * mean)[:, :-1].sum(-1)
            return solution + base

        return solve

    def unknowns(self, predictor: Predictor) -> int:
        """Returns how many weights a predictor has for each head."""
        return int(self._used(predictor).sum())

    def held_out_error(self, predictor: Predictor) -> tuple[float, float]:
        """Returns the lowest mean square error on rows held out, over the heads, and its ridge; NaN without any."""
        if min(self._held_out.count, self._fitted.count) < 2.0:
            return torch.nan, RIDGES[0]
        if predictor not in self._errors:  # the choice asks, and what was chosen is solved for
            solve = self._solver(self._fitted, predictor)
            errors = {ridge: float(self._held_out.error(solve(ridge)).mean()) for ridge in RIDGES}
            ridge = min(errors, key=errors.__getitem__)
            self._errors[predictor] = errors[ridge], ridge
        return self._errors[predictor]

    def solve(self, predictor: Predictor) -> None:
        """Solves the regression of all rows; it needs two."""
        if not predictor.squares:
            self._drop_squares()
        _, ridge = self.held_out_error(predictor)
        self.predictor, sums = predictor, self._fitted + self._held_out
        self._solution = self._solver(sums, predictor)(ridge)
        self.residual = sums.error(self._solution).sqrt()
        self.spread = sums.error(self._solver(sums, Predictor("none"))(ridge)).sqrt()
        self._mean = sums.gram[..., -1] / sums.count
        square = sums.gram.diagonal(dim1=-2, dim2=-1) / sums.count
        variance = square - self._mean.square()
        self._scale = torch.where(variance > _LEAST_VARIANCE * square, variance, 1.0).sqrt()

    def _drop_squares(self) -> None:
        kept = torch.ones(self._fitted.moment.shape[1], dtype=torch.bool, device=self.device)
        kept[2 * self.head_dim + len(FEATURES) : -1] = False
        for sums in (self._fitted, self._held_out):
            sums.gram, sums.moment = sums.gram[:, kept][:, :, kept], sums.moment[:, kept]
        self.squares = self.squares[:, :0]

    def directions(self, count: int) -> Directions:
        """Returns what has to see all rows to find `count` squares of the query that explain what is left."""
        return Directions(self, count)

    def take_squares(self, squares: Tensor) -> None:
        """Starts the regression again with squares, (H, R, D)."""
        self.squares = squares
        self._restart()

    def of(self, rows: Rows) -> Tensor:
        """Returns the predicted s_i, (b, H, Tq)."""
        features = self._features(rows)
        shift: Tensor = torch.linalg.vecdot(features, self._solution.to(features.dtype)[:, None])
        return shift

    def write(self, child: PolyAttention, top: Tensor, radius: Tensor) -> None:
        """Gives a module this shift: its intervals become s_i + [top − 2 · radius, top]; both are (H,)."""
        solution, dim, moments = self._solution, self.head_dim, child.moments
        constant, mu = solution[:, -1], solution[:, :dim]
        if isinstance(moments, MomentShift):
            learned = (solution - self._prior(self.predictor))[:, 2 * dim : -1]
            mean, scale = self._mean[:, 2 * dim : -1], self._scale[:, 2 * dim : -1]
            by_length = solution[:, dim : 2 * dim]
            constant, mu = constant + (learned * mean).sum(-1), mu + mean[:, _LOG_N, None] * by_length
            moments.weights.copy_(learned * scale)
            moments.means.copy_(mean)
            moments.scales.copy_(scale)
            moments.length_shift.copy_(by_length)
            moments.squares.copy_(self.squares)
            moments.lengths.copy_(torch.tensor(self.lengths))
        child.center.copy_(constant + top - radius)
        child.key_shift.copy_(mu)


class Directions:
    """The directions of the query whose squares explain most of what a row shift leaves.

    Of Gaussian queries, E[residual · (z zᵀ − 1)] of whitened z is twice the quadratic form of the regression; its
    largest eigenvectors are taken, and the regression weighs them.
    """

    def __init__(self, shift: RowShift, count: int) -> None:
        self.shift, self.count = shift, count
        zeros = torch.zeros(shift.heads, shift.head_dim, shift.head_dim, dtype=torch.float64, device=shift.device)
        self._left, self._square = zeros, zeros.clone()

    def see(self, rows: Rows) -> None:
        """Adds rows."""
        left = rows_of_heads(((self.shift.target(rows) - self.shift.of(rows)) * rows.weight).unsqueeze(-1))
        query = (
            rows_of_heads(rows.query.to(rows.scores.dtype) * rows.scaling)
            - self.shift._mean[:, None, : self.shift.head_dim]
        )
        self._left += (query * left).mT @ query
        query *= rows_of_heads(rows.weight.unsqueeze(-1))
        self._square += query.mT @ query

    def solve(self) -> Tensor:
        """Returns u, (H, R, D), of variance 1 on the queries."""
        values, vectors = torch.linalg.eigh(self._square / self.shift.count)
        inverse = values.clamp(min=1e-300).rsqrt() * (values > 1e-6 * values[:, -1:])
        whiten = vectors * inverse.unsqueeze(-2) @ vectors.transpose(-1, -2)
        values, vectors = torch.linalg.eigh(whiten @ self._left @ whiten)
        order = values.abs().argsort(-1, descending=True)[:, : self.count]
        chosen = vectors.gather(-1, order.unsqueeze(-2).expand(-1, vectors.shape[1], -1))
        squares = torch.zeros(len(chosen), self.count, chosen.shape[1], device=chosen.device)
        squares[:, : chosen.shape[-1]] = (whiten @ chosen).transpose(-1, -2)  # there are no more than D
        return squares
