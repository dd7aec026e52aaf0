"""The sums, solves and choices behind calibration, for one attention module.

Source: DESIGN.md, "Calibration in closed form".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError
from ..patching.core import PolyAttention
from ..spec import Polynomial

# Widths of the score interval that are tried, in nats. Beyond 80, exp(-W) leaves the range of bf16 and fp32.
WIDTHS = (5.0, 7.0, 10.0, 14.0, 20.0, 30.0)
POWER_WIDTHS = (8.0, 16.0, 24.0, 40.0, 56.0, 80.0)
MARGIN = 0.5  # nats above the largest score that an interval is to cover, before the clamp acts
OUTLIERS = (0.0, 0.01)  # shares of a head's rows whose largest score an interval leaves out, that are tried
RATIO_ROUNDS = 3
RATIO_CANDIDATES = 2  # intervals kept after the first round of the ratio fit
# lse_i ≈ shift_i + α log n_i, so that r_i · exp(x − shift_i) is what softmax computes
ALPHA = {"rsqrt": 0.5, "mean": 1.0, "none": 0.0, "l1": 0.0}
FLOOR = 1e-6  # of the largest value of p on the interval, below which an l1 polynomial may not fall


@dataclass(frozen=True, slots=True)
class LayerReport:
    """How well the polynomials of one attention module reproduce softmax on the calibration data.

    Attributes:
        path: of the attention module.
        explained_variance: per head, 1 − Σ‖out − softmax‖² / Σ‖softmax − its mean‖²; 1 is perfect.
        score_range: per head, smallest and largest score x seen, before the shift.
        interval: per head, the interval of shifted scores that the polynomial covers.
        width: per head, of that interval, nats.
        residual: per head, standard deviation of the log partition sums after the key shift, nats.
    """

    path: str
    explained_variance: tuple[float, ...]
    score_range: tuple[tuple[float, float], ...]
    interval: tuple[tuple[float, float], ...]
    width: tuple[float, ...]
    residual: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Real query rows of a few batch entries; all float32.

    Attributes:
        query: (b, H, Tq, D).
        value: (b, G, Tk, Dv).
        target: softmax's output, (b, H, Tq, Dv).
        scores: (b, H, Tq, Tk), 0 where not visible.
        visible: float 0 or 1, (b, 1 or H, Tq, Tk).
        count: n_i, (b, 1 or H, Tq).
        weight: 1 for real rows that see a key, else 0, (b, H, Tq).
        scaling: of the scores.
    """

    query: Tensor
    value: Tensor
    target: Tensor
    scores: Tensor
    visible: Tensor
    count: Tensor
    weight: Tensor
    scaling: float

    def apply(self, weights: Tensor) -> Tensor:
        """Returns weights · values, (b, H, Tq, Dv)."""
        b, heads, q_len, k_len = weights.shape
        out = weights.reshape(b, self.value.shape[1], -1, k_len) @ self.value
        return out.reshape(b, heads, q_len, -1)


class LayerFit:
    """Sums over all rows of one attention module and what is solved from them. H heads, K = P + 1, C intervals.

    All sums are float64. Nothing is written to the module before `write`.
    """

    def __init__(self, path: str, child: PolyAttention, spec: Polynomial, key_shift: bool) -> None:
        self.path = path
        self.child = child
        self.config = replace(child.config, spec=spec)
        self.fit_shift = key_shift
        self.options: dict[str, Any] = {"dtype": torch.float64, "device": child.coefficients.device}
        self.alpha = ALPHA[spec.normalizer]
        # Powers have width to spare, and without a row sum a clamped top is a weight that is missing.
        self.outliers = OUTLIERS if spec.normalizer == "l1" and spec.power == 1 else OUTLIERS[:1]
        widths = torch.tensor(POWER_WIDTHS if spec.power > 1 else WIDTHS, **self.options)
        self.widths = widths.repeat(len(self.outliers))[:, None].expand(-1, child.heads)  # (C, H)
        heads, width = child.heads, child.head_dim + 1
        self.count = 0.0
        self.gram = torch.zeros(heads, width, width, **self.options)
        self.moment = torch.zeros(heads, width, **self.options)
        self.square = torch.zeros(heads, **self.options)
        self.lowest = torch.full((heads,), torch.inf, **self.options)
        self.highest = torch.full((heads,), -torch.inf, **self.options)
        self.peaks = torch.full((heads, 0), -torch.inf, **self.options)
        self.coefficients = torch.zeros(len(self.widths), heads, spec.degree + 1, **self.options)
        self.best = self.coefficients  # of the rounds so far, with the errors that they make
        self.best_error = torch.full(self.coefficients.shape[:2], torch.inf, **self.options)
        self.solved = 0

    @property
    def rounds(self) -> int:
        """How often the features have to be seen and the coefficients solved."""
        if self.config.spec.power > 1:
            return 0
        return RATIO_ROUNDS if self.config.spec.normalizer == "l1" else 1

    @property
    def needs_errors(self) -> bool:
        """Whether the error has to be measured; linear least squares knows it from its sums."""
        return self.config.spec.power > 1 or self.config.spec.normalizer == "l1"

    def start_pass(self) -> None:
        """Clears the sums of one pass over the batches."""
        shape = self.coefficients.shape
        self.normal = torch.zeros(*shape, shape[-1], **self.options)
        self.linear = torch.zeros(shape, **self.options)
        self.output_square = torch.zeros(shape[:2], **self.options)
        self.product = torch.zeros(shape[:2], **self.options)
        self.target_count = 0.0
        self.target_sum: Tensor | float = 0.0
        self.target_square = torch.zeros(shape[1], **self.options)

    def see_target(self, rows: Rows) -> Tensor:
        """Returns softmax's output in float64 and counts it towards the variance to explain."""
        target = rows.target.double()
        self.target_count += float(rows.weight[:, 0].sum())
        self.target_sum = self.target_sum + target.sum((0, 2))
        self.target_square += target.square().sum((0, 2, 3))
        return target

    # ------------------------------------------------------------------ 1. the key shift

    def see_partition_sums(self, rows: Rows) -> None:
        """Adds rows to the regression of lse_i − α log n_i on (scaling · q_i, 1)."""
        lse = rows.scores.masked_fill(rows.visible == 0.0, -torch.inf).logsumexp(-1)
        y = (lse.masked_fill(rows.weight == 0.0, 0.0) - self.alpha * rows.count.log()).double() * rows.weight
        x = torch.cat([rows.query * rows.scaling, torch.ones_like(rows.query[..., :1])], -1).double()
        x = x * rows.weight.unsqueeze(-1)
        self.gram += torch.einsum("bhti,bhtj->hij", x, x)
        self.moment += torch.einsum("bhti,bht->hi", x, y)
        self.square += y.square().sum((0, 2))
        self.count += float(rows.weight[:, 0].sum())

    def solve_key_shift(self) -> None:
        """Computes the shift of each head: μ_h and an offset, (H, D + 1).

        Raises:
            CalibrationError: fewer than two rows.
        """
        if self.count < 2:
            raise CalibrationError(
                f"layer {self.path!r} saw {int(self.count)} query rows that are not padding; give more"
            )
        if self.fit_shift:
            self.shift = _solve(self.gram, self.moment, ridge=1e-6)
        else:
            self.shift = torch.zeros_like(self.moment)
            self.shift[:, -1] = self.moment[:, -1] / self.count
        explained = 2.0 * (self.shift * self.moment).sum(-1)
        explained = explained - torch.einsum("hi,hij,hj->h", self.shift, self.gram, self.shift)
        self.residual = ((self.square - explained) / self.count).clamp(min=0.0).sqrt()

    def shifted(self, rows: Rows) -> Tensor:
        """Returns x − shift_i, (b, H, Tq, Tk)."""
        shift = rows.scaling * (rows.query @ self.shift[:, :-1, None].float()).squeeze(-1)
        return rows.scores - (shift + self.shift[:, -1, None].float()).unsqueeze(-1)

    # ------------------------------------------------------------------ 2. the interval

    def see_range(self, rows: Rows) -> None:
        """Follows the extremes of the scores, and the largest of the rows' largest shifted scores."""
        hidden = (rows.visible * rows.weight.unsqueeze(-1)) == 0.0

        def highest(scores: Tensor) -> Tensor:
            return scores.masked_fill(hidden, -torch.inf).amax((0, 2, 3)).double()

        self.highest = torch.maximum(self.highest, highest(rows.scores))
        self.lowest = torch.minimum(self.lowest, -highest(-rows.scores))
        peaks = self.shifted(rows).masked_fill(hidden, -torch.inf).amax(-1).transpose(0, 1).flatten(1).double()
        peaks = torch.cat([self.peaks, peaks], 1)
        self.peaks = peaks.topk(min(int(max(self.outliers) * self.count) + 1, peaks.shape[1]), sorted=True).values

    def choose_candidates(self) -> None:
        """Fixes the intervals that are tried; for powers, their coefficients too."""
        ranks = [min(int(share * self.count), self.peaks.shape[1] - 1) for share in self.outliers]
        tops = self.peaks[:, ranks].T + MARGIN
        self.tops = tops.repeat_interleave(len(self.widths) // len(ranks), 0)  # (C, H)
        if self.config.spec.power > 1:
            for candidate, width in enumerate(self.widths[:, 0].tolist()):
                self.coefficients[candidate] = exponential_fit(self.config.spec.degree, width / self.config.spec.power)

    def arguments(self, shifted: Tensor, candidate: int) -> Tensor:
        """Returns t, limited to [−1, 1]."""
        radius = self.widths[candidate].float()[:, None, None] / 2.0
        center = self.tops[candidate].float()[:, None, None] - radius
        return ((shifted - center) / radius).clamp_(-1.0, 1.0)

    # ------------------------------------------------------------------ 3. the coefficients

    def see_features(self, rows: Rows) -> None:
        """Adds rows to the normal equations of every candidate."""
        shifted, target = self.shifted(rows), self.see_target(rows)
        ratio = self.config.spec.normalizer == "l1"
        scale = rows.weight * _row_scale(self.config.spec.normalizer, rows.count)
        for candidate in range(len(self.widths)):
            t = self.arguments(shifted, candidate)
            feature, features, sums = rows.visible.expand_as(t).clone(), [], []
            for k in range(self.config.spec.degree + 1):
                if k:
                    feature.mul_(t)
                features.append(rows.apply(feature))
                sums.append(feature.sum(-1))
            f, s = torch.stack(features), torch.stack(sums)  # (K, b, H, Tq, Dv), (K, b, H, Tq)
            if ratio:
                z = self._partition_sums(shifted, s, rows, candidate)
                f = (f - rows.target * s.unsqueeze(-1)) * (rows.weight / z).unsqueeze(-1)
                self.linear[candidate] += (s * (rows.weight / z)).double().sum((1, 3)).T
            else:
                f = f * scale.unsqueeze(-1)
                self.linear[candidate] += torch.einsum("kbhtd,bhtd->hk", f.double(), target)
            g = f.permute(2, 0, 1, 3, 4).flatten(2).double()  # (H, K, b · Tq · Dv)
            self.normal[candidate] += g @ g.transpose(1, 2)

    def _partition_sums(self, shifted: Tensor, sums: Tensor, rows: Rows, candidate: int) -> Tensor:
        """Returns Z_i: softmax's own partition sums first, then those of the last coefficients."""
        if self.solved == 0:
            top = self.tops[candidate].float()[:, None, None]
            return ((shifted - top).exp() * rows.visible).sum(-1).clamp(min=1e-30, max=1e30)
        z = torch.einsum("hk,kbht->bht", self.coefficients[candidate].float(), sums)
        return z.abs().clamp(min=1e-30)

    def solve_coefficients(self) -> None:
        """Solves the normal equations of every candidate."""
        normal, linear = self.normal, self.linear
        if self.config.granularity == "layer":
            normal = normal.sum(1, keepdim=True).expand_as(normal)
            linear = linear.sum(1, keepdim=True).expand_as(linear)
        if self.config.spec.normalizer == "l1":
            if self.solved > 1:  # with Z_i their own, the quadratic form is the error of the last coefficients
                self._remember(_quadratic(self.coefficients, self.normal))
            self.coefficients = _solve_ratio(normal, linear)
        else:
            self.coefficients = _solve(normal, linear)
            self.output_square = _quadratic(self.coefficients, self.normal)
            self.product = (self.coefficients * self.linear).sum(-1)
        self.solved += 1

    def choose_intervals(self) -> None:
        """Goes on with the best intervals of each head, by the errors that the first coefficients make.

        The linear objective does not tell: it weighs a row by Σ_k c_k S_k / Z, near 0 where c neglects the row.
        """
        self._remember(self._errors())
        self._keep(self._comparable(self.best_error).argsort(0)[:RATIO_CANDIDATES])

    def _errors(self) -> Tensor:
        """Returns Σ‖out − target‖² of the last pass, (C, H)."""
        error = self.output_square - 2.0 * self.product + self.target_square
        return error.nan_to_num(nan=torch.inf)

    def _comparable(self, error: Tensor) -> Tensor:
        """Returns the errors by which heads choose, (C, H): their own, or those of the layer."""
        return error if self.config.granularity == "head" else error.sum(1, keepdim=True).expand_as(error)

    def _remember(self, error: Tensor) -> None:
        """Keeps the coefficients where their errors (C, H) are the lowest so far."""
        better = self._comparable(error) < self._comparable(self.best_error)
        self.best = torch.where(better.unsqueeze(-1), self.coefficients, self.best)
        self.best_error = torch.where(better, error, self.best_error)

    def _keep(self, candidates: Tensor) -> None:
        """Goes on with some candidates of each head: indices (C', H)."""
        heads = torch.arange(candidates.shape[1], device=candidates.device)
        self.widths = self.widths[candidates, heads]
        self.tops = self.tops[candidates, heads]
        self.coefficients = self.coefficients[candidates, heads]
        self.best = self.best[candidates, heads]
        self.best_error = self.best_error[candidates, heads]

    # ------------------------------------------------------------------ the choice of the width

    def see_errors(self, rows: Rows) -> None:
        """Measures every candidate as the operator would run it."""
        shifted, target = self.shifted(rows), self.see_target(rows)
        for candidate in range(len(self.widths)):
            t = self.arguments(shifted, candidate)
            c = self.coefficients[candidate].float()[:, None, None, :]
            w = torch.zeros_like(t)
            for k in range(c.shape[-1] - 1, -1, -1):
                w = w * t + c[..., k]
            for _ in range(self.config.spec.power.bit_length() - 1):
                w = w * w
            w = w * rows.visible
            if self.config.spec.normalizer == "l1":
                scale = 1.0 / w.abs().sum(-1).clamp(min=1e-37)
            else:
                scale = _row_scale(self.config.spec.normalizer, rows.count).expand_as(rows.weight)
            out = (rows.apply(w) * (scale * rows.weight).unsqueeze(-1)).double()
            self.product[candidate] += (out * target).sum((0, 2, 3))
            self.output_square[candidate] += out.square().sum((0, 2, 3))

    def finish(self) -> None:
        """Chooses the best candidate of each head and reports it in `report`."""
        spec = self.config.spec
        error = self._errors()
        if spec.power > 1 and spec.normalizer != "l1":
            # a power of a fit to exp is right up to a factor: that of least squares, put inside the power
            gain = (self.product / self.output_square.clamp(min=1e-300)).clamp(min=1e-300)
            error = (self.target_square - self.product * gain).nan_to_num(nan=torch.inf)
            self.coefficients = self.coefficients * gain.pow(1.0 / spec.power).unsqueeze(-1)
        elif spec.normalizer == "l1":
            self._remember(error)
            error, self.coefficients = self.best_error, self.best
            self.coefficients = self.coefficients / self.coefficients.abs().amax(-1, keepdim=True)
        chosen = self._comparable(error).argmin(0, keepdim=True)
        self._keep(chosen)
        mean_square = torch.as_tensor(self.target_sum, **self.options).square().sum(-1) / self.target_count
        variance = (self.target_square - mean_square).clamp(min=1e-30)
        explained = 1.0 - error.gather(0, chosen)[0] / variance
        self.report = LayerReport(
            path=self.path,
            explained_variance=tuple(explained.tolist()),
            score_range=tuple(zip(self.lowest.tolist(), self.highest.tolist(), strict=True)),
            interval=tuple(zip((self.tops[0] - self.widths[0]).tolist(), self.tops[0].tolist(), strict=True)),
            width=tuple(self.widths[0].tolist()),
            residual=tuple(self.residual.tolist()),
        )

    def write(self) -> None:
        """Copies what was chosen into the module."""
        radius = self.widths[0] / 2.0
        child = self.child
        child.coefficients.copy_(self.coefficients[0, : child.coefficients.shape[0]])
        child.center.copy_(self.shift[:, -1] + self.tops[0] - radius)
        child.key_shift.copy_(self.shift[:, :-1])
        child.radius.copy_(radius)


def _quadratic(coefficients: Tensor, normal: Tensor) -> Tensor:
    return torch.einsum("...i,...ij,...j->...", coefficients, normal, coefficients)


def _row_scale(normalizer: str, count: Tensor) -> Tensor:
    if normalizer == "rsqrt":
        return count.rsqrt()
    return 1.0 / count if normalizer == "mean" else torch.ones_like(count)


def exponential_fit(degree: int, width: float) -> Tensor:
    """Returns the coefficients of p(t) ≈ exp(u), u = (t − 1) · width / 2 on [−1, 1], in relative error.

    Least squares at Chebyshev nodes of p(t)/exp(u) − 1; (degree + 1,), float64, p(1) about 1.
    """
    nodes = torch.cos(torch.pi * (torch.arange(64, dtype=torch.float64) + 0.5) / 64)
    powers = nodes[:, None] ** torch.arange(degree + 1)
    scaled = powers * torch.exp(-(nodes[:, None] - 1.0) * width / 2.0)
    solution: Tensor = torch.linalg.lstsq(scaled, torch.ones(64, 1, dtype=torch.float64)).solution[:, 0]
    return solution


def _solve(matrix: Tensor, vector: Tensor, ridge: float = 1e-12) -> Tensor:
    """Solves symmetric positive semi-definite systems (..., n, n) x = (..., n), rank-deficient ones too."""
    scale = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=1e-300).rsqrt()
    values, vectors = torch.linalg.eigh(matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2))
    inverse = 1.0 / (values + ridge) * (values > 1e-13 * values[..., -1:])
    rotated = (vectors.transpose(-1, -2) @ (vector * scale).unsqueeze(-1)).squeeze(-1)
    solution: Tensor = scale * (vectors @ (inverse * rotated).unsqueeze(-1)).squeeze(-1)
    return solution


def _solve_ratio(matrix: Tensor, vector: Tensor) -> Tensor:
    """Minimises c'Ac subject to b'c = 1 and p(t) ≥ FLOOR · max p on [−1, 1]: (..., K, K), (..., K) → (..., K).

    The bound is met by a growing quadratic penalty on the Chebyshev nodes that violate it: where p touches
    zero so may a row sum, and the gradient of a ratio is then infinite.
    """
    count = vector.shape[-1]
    a, b = matrix.reshape(-1, count, count).cpu().numpy(), vector.reshape(-1, count).cpu().numpy()
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    powers = nodes[:, None] ** np.arange(count)  # (64, K)
    squares = (powers[:, :, None] * powers[:, None, :]).reshape(64, -1)
    a = a / np.maximum(np.trace(a, axis1=1, axis2=2), 1e-300)[:, None, None] + 1e-12 * np.eye(count)
    penalty, floor = np.zeros((len(a), 64)), np.zeros((len(a), 1))
    for _ in range(30):
        bounded = a + (penalty @ squares).reshape(a.shape)
        solved = np.linalg.solve(bounded, np.stack([(penalty * floor) @ powers, b], -1))
        pulled, free = solved[..., 0], solved[..., 1]
        multiplier = (1.0 - (b * pulled).sum(-1)) / (b * free).sum(-1)
        c = pulled + free * multiplier[:, None]
        values = c @ powers.T
        floor = FLOOR * values.max(-1, keepdims=True)
        violated = values < 0.5 * floor
        if not violated.any():
            break
        penalty = np.where(violated, np.maximum(penalty * 8.0, 1e-6), penalty)
    return torch.from_numpy(c).reshape(vector.shape).to(vector.device)
