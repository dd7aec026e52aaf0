"""The polynomial of each head over the scores it was fitted to, and exp behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .style import GRID, INK, canvas, color_of, styled


@dataclass(frozen=True, slots=True)
class HeadCurve:
    """One head's polynomial; all are sequences of numbers.

    Attributes:
        title: of the head.
        scores: where the curves are drawn: scores after the row shift, nats.
        polynomial: p(t)^s there.
        exponential: what it stands in for there, on its scale.
        edges: of the histogram's bins, one more than bins; empty where there is none.
        counts: shares of the visible scores in the bins.
    """

    title: str
    scores: Sequence[float]
    polynomial: Sequence[float]
    exponential: Sequence[float]
    edges: Sequence[float] = ()
    counts: Sequence[float] = ()


@styled
def draw_curves(curves: Sequence[HeadCurve], title: str) -> Any:
    """Returns a figure with a panel for each head."""
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = canvas(rows, columns, 2.6 * columns + 0.6, 2.1 * rows + 1.0)
    for number, curve in enumerate(curves):
        panel = axes[number // columns][number % columns]
        _draw_histogram(panel, curve)
        panel.plot(curve.scores, curve.exponential, color=INK, linewidth=3.2, alpha=0.45, label="exp, as in softmax")
        panel.plot(curve.scores, curve.polynomial, color=color_of(0), label="the head's polynomial")
        panel.axhline(0.0, color=GRID, linewidth=0.8)
        panel.set_ylim(*_limits(curve))
        panel.set_title(curve.title, fontsize=9)
        if number >= len(curves) - columns:
            panel.set_xlabel("score after the row shift, nats", fontsize=8.5)
    for panel in axes.flat[len(curves) :]:
        panel.set_axis_off()
    from matplotlib.patches import Patch

    handles, labels = axes[0][0].get_legend_handles_labels()
    if any(len(curve.counts) for curve in curves):
        handles, labels = [*handles, Patch(color=GRID, alpha=0.35)], [*labels, "how many scores are there"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.supylabel("weight before the row's scale", fontsize=9.5)
    figure.suptitle(title)
    return figure


def _limits(curve: HeadCurve) -> tuple[float, float]:
    """Returns the height of a panel: the polynomial's; exp runs out of it where the polynomial cannot follow."""
    low, high = min(0.0, *curve.polynomial), max(*curve.polynomial, 1e-12)
    return low - 0.08 * (high - low), high + 0.25 * (high - low)


def _draw_histogram(panel: Any, curve: HeadCurve) -> None:
    """Fills the histogram from the panel's 0 up; the outermost bins, where all beyond is counted, may be cut."""
    if not len(curve.counts):
        return
    behind = panel.twinx()
    behind.stairs(curve.counts, curve.edges, fill=True, color=GRID, alpha=0.4)
    low, high = _limits(curve)
    highest = 1.2 * max(*curve.counts[1:-1], 1e-12)
    behind.set_ylim(highest * low / high, highest)
    behind.axis("off")
    panel.set_zorder(behind.get_zorder() + 1)
    panel.patch.set_visible(False)
