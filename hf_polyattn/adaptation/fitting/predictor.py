"""Which predictor of the row shift a model gets: the one that rows held out ask for, or the one that was asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import cast

from ...errors import InputError
from ...patching.row_shift import SQUARES
from ...spec import RowShift as RowShiftKind
from .row_shift import Predictor, RowShift

KINDS = ("auto", "none", "linear", "moments")
ROWS_FOR_AN_UNKNOWN = 4  # below which a predictor is not tried
GAIN = 0.95  # of the residual, that a costlier predictor has to reach


class PredictorChoice:
    """The predictor of all layers of a model, decided once they have seen their rows.

    Args:
        row_shift: `auto`, or a `row_shift` of `PolyAttentionConfig`.
        squares: of the query, beside the moments; None leaves it to the data under `auto`, and is 0 else.
        worth_it: whether `auto` may take more than the linear shift: powers have width to spare, and need it least.

    Raises:
        InputError: an unknown row_shift, or squares without moments.
    """

    def __init__(self, row_shift: str, squares: int | None, *, worth_it: bool) -> None:
        if row_shift not in KINDS:
            raise InputError(f"row_shift must be one of {KINDS}, got {row_shift!r}")
        if squares and row_shift not in ("auto", "moments"):
            raise InputError(f"squares join the moments: row_shift must be 'moments' or 'auto', got {row_shift!r}")
        self.row_shift, self.squares, self.worth_it = row_shift, squares, worth_it
        self.shifts: list[RowShift] = []
        self._first: Predictor | None = None
        self._last: Predictor | None = None

    def first(self) -> Predictor:
        """Returns what to solve for once all rows were seen; with squares, if they are worth a try."""
        if self._first is None:
            self._first = self._decide()
        return self._first

    def _decide(self) -> Predictor:
        if self.row_shift != "auto":
            return Predictor(cast("RowShiftKind", self.row_shift), self.squares or 0)
        moments, squares = Predictor("moments"), SQUARES if self.squares is None else self.squares
        if not self.worth_it or any(s.count < ROWS_FOR_AN_UNKNOWN * s.unknowns(moments) for s in self.shifts):
            return Predictor("linear")
        simple, better = (_residual(self.shifts, predictor) for predictor in (Predictor("linear"), moments))
        if math.isnan(simple):
            warnings.warn(
                "too few rows to hold some out: the row shift stays linear. Give more batches, or row_shift='moments'.",
                stacklevel=2,
            )
            return Predictor("linear")
        return Predictor("moments", squares) if better < GAIN * simple else Predictor("linear")

    def last(self) -> Predictor:
        """Returns what to solve for once the rows were seen with their squares."""
        if self._last is None:
            self._last = first = self.first()
            if self.row_shift == "auto" and self.squares is None and first.squares:
                without = Predictor(first.kind)
                if not _residual(self.shifts, first) < GAIN * _residual(self.shifts, without):
                    self._last = without
        return self._last


def _residual(shifts: Sequence[RowShift], predictor: Predictor) -> float:
    """Returns what a predictor leaves of s_i on rows held out, nats, mean of the layers' root mean squares."""
    return sum(math.sqrt(shift.held_out_error(predictor)[0]) for shift in shifts) / len(shifts)
