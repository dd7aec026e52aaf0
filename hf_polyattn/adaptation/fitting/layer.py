"""The fit of one attention module: row shift, intervals, coefficients, and the choice among the candidates."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import Tensor

from ...errors import CalibrationError
from ...patching.core import PolyAttention
from ...patching.row_shift import Refinement, alpha_of
from ...spec import PolyAttentionConfig, Polynomial
from .coefficients import CoefficientFit, See, fit_of
from .errors import comparable
from .interval import ScoreRange, take
from .predictor import PredictorChoice
from .refinement import FittedRefinement
from .row_shift import RowShift
from .rows import Rows

MAX_ROWS = 2048  # query rows a layer that the coefficients are fitted to


@dataclass(frozen=True, slots=True)
class LayerReport:
    """How well the polynomials of one attention module reproduce softmax on the calibration data.

    Attributes:
        path: of the attention module.
        explained_variance: per head, 1 − Σ‖out − softmax‖² / Σ‖softmax − its mean‖²; 1 is perfect.
        score_range: per head, smallest and largest score x seen, before the shift.
        interval: per head, the interval of shifted scores that the polynomial covers.
        width: per head, of that interval, nats.
        residual: per head, standard deviation of what the row shift leaves of the log partition sums, nats.
        spread: per head, their standard deviation before.
    """

    path: str
    explained_variance: tuple[float, ...]
    score_range: tuple[tuple[float, float], ...]
    interval: tuple[tuple[float, float], ...]
    width: tuple[float, ...]
    residual: tuple[float, ...]
    spread: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """What a fit has to be shown next.

    Attributes:
        title: of the progress bar.
        see: takes every `stride`-th query row, in chunks.
        stride: 1 for all rows.
    """

    title: str
    see: Callable[[Rows], None]
    stride: int = 1


class LayerFit:
    """The polynomials of one attention module, fitted in a few passes over its rows and written when told to.

    Args:
        path: of the attention module.
        child: its `PolyAttention`.
        spec: the polynomial to fit.
        choice: of the predictor of the row shift, for all layers of the model.

    Attributes:
        config: the child's, with the spec and, once the passes are over, the row shift.
        report: once the passes are over.
    """

    report: LayerReport

    def __init__(self, path: str, child: PolyAttention, spec: Polynomial, choice: PredictorChoice) -> None:
        self.path, self.child, self.choice = path, child, choice
        self.config = replace(child.config, spec=spec)
        self.shift = RowShift(child.heads, child.head_dim, alpha_of(spec.normalizer), child.coefficients.device)
        self.refinements: list[FittedRefinement] = []
        # What the shift, and each refinement, take from the scores of rows: those of a later pass are often the same.
        self._steps: WeakKeyDictionary[Rows, list[Tensor]] = WeakKeyDictionary()
        choice.shifts.append(self.shift)

    @property
    def count(self) -> int:
        """Query rows that are not padding."""
        return int(self.shift.count)

    @property
    def unknowns(self) -> int:
        """Unknowns of the larger of a head's two regressions: of its row shift, and of its coefficients."""
        return max(self.shift.unknowns(self.shift.predictor), self.config.spec.degree + 1)

    def passes(self) -> Iterator[Pass]:
        """Yields the passes that are needed, one after the other: a pass is over when the next one is asked for.

        Raises:
            CalibrationError: fewer than two rows.
        """
        yield Pass("row shift", self.shift.see)
        if self.count < 2:
            raise CalibrationError(f"layer {self.path!r} saw {self.count} query rows that are not padding; give more")
        predictor = self.choice.first()
        if predictor.squares:
            self.shift.solve(replace(predictor, squares=0))
            directions = self.shift.directions(predictor.squares)
            yield Pass("squares", directions.see)
            self.shift.take_squares(directions.solve())
            yield Pass("row shift with squares", self.shift.see)
            predictor = self.choice.last()
        self.shift.solve(predictor)
        squares = self.shift.squares.shape[1]
        self.config = replace(
            self.config, row_shift=predictor.kind, squares=squares, key_shift=predictor.kind != "none"
        )

        spec = self.config.spec
        summed = replace(spec, normalizer="none") if spec.normalizer == "l1" else spec
        for number in range(1, spec.refinements + 1):
            fit = yield from self._fit(replace(self.config, spec=summed), f"refinement {number}: ")
            best = _best(fit, self.config)
            refinement = FittedRefinement(summed, fit.intervals.take(best), take(fit.coefficients, best)[0], self.shift)
            yield Pass(f"refinement {number}", self._shifted(refinement.see))
            refinement.solve()
            self.refinements.append(refinement)
        fit = yield from self._fit(self.config, "")
        self._choose(fit)

    def _fit(self, config: PolyAttentionConfig, title: str) -> Generator[Pass, None, CoefficientFit]:
        """Yields the passes of a fit at the shift as it is now, and returns it."""
        clamp, device = config.clamp is not False, self.child.coefficients.device
        self._scores = ScoreRange(config.spec, self.child.heads, self.count, device, clamp)
        yield Pass(f"{title}score range", self._shifted(self._scores.see))
        fit = fit_of(config, self._scores.intervals())
        for step, see in fit.passes():
            yield Pass(f"{title}{step}", self._shifted(see), stride=max(1, self.count // MAX_ROWS))
        return fit

    def _shifted(self, see: See) -> Callable[[Rows], None]:
        def show(rows: Rows) -> None:
            steps = self._steps.setdefault(rows, [])
            if not steps:
                steps.append(self.shift.of(rows).unsqueeze(-1))
            shifted = rows.scores - steps[0]
            for number, refinement in enumerate(self.refinements, 1):
                if number == len(steps):
                    steps.append(refinement.of(rows, shifted).unsqueeze(-1))
                shifted -= steps[number]
            see(rows, shifted)

        return show

    def _choose(self, fit: CoefficientFit) -> None:
        """Takes the candidate of each head with the smallest error, and reports it."""
        best, scores = _best(fit, self.config), self._scores
        residual = (self.refinements[-1] if self.refinements else self.shift).residual

        def chosen(of_candidates: Tensor) -> Tensor:
            return take(of_candidates, best)[0]

        self.coefficients = chosen(fit.coefficients)  # (H, K)
        self.top, self.width = chosen(fit.intervals.tops), chosen(fit.intervals.widths)
        explained = 1.0 - chosen(fit.errors) / fit.target.variance()
        self.report = LayerReport(
            path=self.path,
            explained_variance=tuple(explained.tolist()),
            score_range=tuple(zip(scores.lowest.tolist(), scores.highest.tolist(), strict=True)),
            interval=tuple(zip((self.top - self.width).tolist(), self.top.tolist(), strict=True)),
            width=tuple(self.width.tolist()),
            residual=tuple(residual.tolist()),
            spread=tuple(self.shift.spread.tolist()),
        )

    def write(self) -> None:
        """Copies what was chosen into the module, which has the config."""
        radius = self.width / 2.0
        self.child.set_coefficients(self.coefficients[: self.child.coefficients.shape[0]], self.config.spec)
        self.child.radius.copy_(radius)
        self.shift.write(self.child, self.top, radius)
        for fitted, module in zip(self.refinements, self.child.refinements or (), strict=True):
            assert isinstance(module, Refinement)
            fitted.write(module, self.top, radius)


def _best(fit: CoefficientFit, config: PolyAttentionConfig) -> Tensor:
    """Returns the candidate of each head with the smallest error, (1, H)."""
    return comparable(fit.errors, config).argmin(0, keepdim=True)
