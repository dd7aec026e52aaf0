"""Score intervals: on which the polynomials of a head are tried, in nats and after the row shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...spec import Polynomial
from .rows import Rows

# Widths that are tried. Beyond 80, exp(-W) leaves the range of bf16 and fp32.
WIDTHS = (5.0, 7.0, 10.0, 14.0, 20.0, 30.0)
POWER_WIDTHS = (8.0, 16.0, 24.0, 40.0, 56.0, 80.0)
MARGIN = 0.5  # above the largest score that an interval is to cover, before the clamp acts
OUTLIERS = (0.0, 0.01)  # shares of a head's rows whose largest score an interval leaves out, that are tried


@dataclass(frozen=True, slots=True)
class Intervals:
    """Candidates [top − width, top] of each head.

    Attributes:
        tops: (C, H).
        widths: (C, H).
        clamp: whether scores outside an interval count as its ends.
        below: how far the lowest score that occurs lies below each interval, nats, (C, H); only without a clamp.
    """

    tops: Tensor
    widths: Tensor
    clamp: bool = True
    below: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tops)

    def arguments(self, shifted: Tensor, candidate: int) -> Tensor:
        """Returns t of shifted scores, with clamp limited to [−1, 1]."""
        return self._arguments(shifted, *(ends[candidate][:, None, None] for ends in (self.tops, self.widths)))

    def grouped_arguments(self, shifted: Tensor, candidates: slice, groups: int) -> Tensor:
        """Returns t for several candidates: shifted (b, H, Tq, Tk) → (b, G, C, H / G, Tq, Tk)."""
        b, _, q_len, k_len = shifted.shape
        ends = (grouped(ends[candidates], groups) for ends in (self.tops, self.widths))
        return self._arguments(shifted.reshape(b, groups, 1, -1, q_len, k_len), *ends)

    def _arguments(self, shifted: Tensor, top: Tensor, width: Tensor) -> Tensor:
        top, radius = top.to(shifted.dtype), width.to(shifted.dtype) / 2.0
        t = (shifted - (top - radius)).div_(radius)
        return t.clamp_(-1.0, 1.0) if self.clamp else t

    def take(self, candidates: Tensor) -> Intervals:
        """Returns some candidates of each head, (C', H)."""
        below = None if self.below is None else take(self.below, candidates)
        return Intervals(take(self.tops, candidates), take(self.widths, candidates), self.clamp, below)


def grouped(of_candidates: Tensor, groups: int) -> Tensor:
    """Returns (C, H) as (G, C, H / G, 1, 1), beside scores of `Intervals.grouped_arguments`."""
    return of_candidates.reshape(len(of_candidates), groups, -1).transpose(0, 1)[..., None, None]


def take(tensor: Tensor, candidates: Tensor) -> Tensor:
    """Returns what belongs to some candidates of each head: (C, H, …), indices (C', H) → (C', H, …)."""
    return tensor[candidates, torch.arange(candidates.shape[1], device=candidates.device)]


class ScoreRange:
    """The extremes of a module's scores, and the intervals that are worth trying there.

    Args:
        spec: the polynomial.
        heads: H.
        count: rows that will be seen.
        device: of the extremes.
        clamp: whether the polynomial will be; without, it has to be right for every score that occurs.

    Attributes:
        lowest, highest: score before the shift, (H,).
    """

    def __init__(self, spec: Polynomial, heads: int, count: float, device: torch.device, clamp: bool = True) -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        # Powers have width to spare, and without a row sum a clamped top is a weight that is missing.
        self.outliers = OUTLIERS if spec.normalizer == "l1" and spec.power == 1 and clamp else OUTLIERS[:1]
        self.spec, self.clamp = spec, clamp
        self.widths = torch.tensor(POWER_WIDTHS if spec.power > 1 else WIDTHS, **options)
        self.count = count
        self.lowest = torch.full((heads,), torch.inf, **options)
        self.highest = torch.full((heads,), -torch.inf, **options)
        self._peaks = torch.full((heads, 0), -torch.inf, **options)
        self._floor = torch.full((heads,), torch.inf, **options)

    def see(self, rows: Rows, shifted: Tensor) -> None:
        """Follows the extremes of the scores, and the largest of the rows' largest shifted scores."""
        hidden = (rows.visible * rows.weight.unsqueeze(-1)) == 0.0

        def highest(scores: Tensor) -> Tensor:
            return scores.masked_fill(hidden, -torch.inf).amax((0, 2, 3)).double()

        self.highest = torch.maximum(self.highest, highest(rows.scores))
        self.lowest = torch.minimum(self.lowest, -highest(-rows.scores))
        self._floor = torch.minimum(self._floor, -highest(-shifted))
        peaks = shifted.masked_fill(hidden, -torch.inf).amax(-1).transpose(0, 1).flatten(1).double()
        peaks = torch.cat([self._peaks, peaks], 1)
        self._peaks = peaks.topk(min(int(max(self.outliers) * self.count) + 1, peaks.shape[1]), sorted=True).values

    def intervals(self) -> Intervals:
        """Returns every width below every top: the largest shifted score and, without outliers, the largest left."""
        ranks = [min(int(share * self.count), self._peaks.shape[1] - 1) for share in self.outliers]
        tops = self._peaks[:, ranks].T + MARGIN
        if not self.clamp:
            return self._unclamped(tops)
        widths = self.widths.repeat(len(ranks))[:, None].expand(-1, tops.shape[1])
        return Intervals(tops.repeat_interleave(len(self.widths), 0), widths)

    def _unclamped(self, tops: Tensor) -> Intervals:
        """Returns the intervals of a polynomial that nothing limits, below tops (1, H).

        All polynomials of a degree are the same functions on any interval: one holds every score that occurs. A power
        is fitted to exp at the top of its interval only, so its width matters, and how far scores lie below.
        """
        reach = tops - self._floor + MARGIN
        if self.spec.power == 1:
            return Intervals(tops, reach, clamp=False, below=torch.zeros_like(reach))
        widths = torch.minimum(self.widths[:, None], reach)
        return Intervals(tops.expand_as(widths), widths, clamp=False, below=reach - widths)
