"""The fit of one attention module: row shift, intervals, coefficients, and the choice among the candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ...errors import CalibrationError
from ...patching.core import PolyAttention
from ...spec import Polynomial
from .coefficients import CoefficientFit, See, fit_of
from .errors import comparable
from .interval import ScoreRange, take
from .row_shift import ALPHA, RowShift
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
        residual: per head, standard deviation of the log partition sums after the key shift, nats.
    """

    path: str
    explained_variance: tuple[float, ...]
    score_range: tuple[tuple[float, float], ...]
    interval: tuple[tuple[float, float], ...]
    width: tuple[float, ...]
    residual: tuple[float, ...]


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
        key_shift: whether to fit the key shift.

    Attributes:
        config: the child's, with the spec.
        report: once the passes are over.
    """

    report: LayerReport

    def __init__(self, path: str, child: PolyAttention, spec: Polynomial, key_shift: bool) -> None:
        self.path, self.child = path, child
        self.config = replace(child.config, spec=spec)
        self.shift = RowShift(
            child.heads,
            child.head_dim,
            ALPHA[spec.normalizer],
            key_shift=key_shift,
            device=child.coefficients.device,
        )

    @property
    def count(self) -> int:
        """Query rows that are not padding."""
        return int(self.shift.count)

    def passes(self) -> Iterator[Pass]:
        """Yields the passes that are needed, one after the other: a pass is over when the next one is asked for.

        Raises:
            CalibrationError: fewer than two rows.
        """
        yield Pass("key shift", self.shift.see)
        if self.count < 2:
            raise CalibrationError(f"layer {self.path!r} saw {self.count} query rows that are not padding; give more")
        self.shift.solve()
        scores = ScoreRange(self.config.spec, self.child.heads, self.count, self.child.coefficients.device)
        yield Pass("score range", self._shifted(scores.see))
        fit = fit_of(self.config, scores.intervals())
        for title, see in fit.passes():
            yield Pass(title, self._shifted(see), stride=max(1, self.count // MAX_ROWS))
        self._choose(fit, scores)

    def _shifted(self, see: See) -> Callable[[Rows], None]:
        return lambda rows: see(rows, rows.scores - self.shift.of(rows).unsqueeze(-1))

    def _choose(self, fit: CoefficientFit, scores: ScoreRange) -> None:
        """Takes the candidate of each head with the smallest error, and reports it."""
        best = comparable(fit.errors, self.config).argmin(0, keepdim=True)

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
            residual=tuple(self.shift.residual.tolist()),
        )

    def write(self) -> None:
        """Copies what was chosen into the module."""
        radius = self.width / 2.0
        self.child.coefficients.copy_(self.coefficients[: self.child.coefficients.shape[0]])
        self.child.radius.copy_(radius)
        self.shift.write(self.child, self.top, radius)
