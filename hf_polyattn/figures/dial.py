"""What positions of the dial cost and keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .style import GRID, INK, canvas, color_of, legend_below, styled


@styled
def draw_conversion(report: Any) -> Any:
    """Returns a figure of a `ConversionReport`: quality against cost, of one spec everywhere and layer by layer."""
    figure, ((axes,),) = canvas(1, 1, 7.0, 4.4)
    axes.axhline(report.floor, color=GRID, linestyle="--", linewidth=1.2, label=f"floor {report.floor:g}")
    mixed = sorted(report.mixed, key=lambda point: point.cost)
    axes.plot([p.cost for p in mixed], [p.quality for p in mixed], ".-", color=color_of(1), label="a spec a layer")
    uniform = report.uniform
    axes.plot([p.cost for p in uniform], [p.quality for p in uniform], "o", label="one spec everywhere")
    for point in uniform:
        name = next(iter(point.specs.values()))
        axes.annotate(name, (point.cost, point.quality), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.plot(report.chosen.cost, report.chosen.quality, "*", color=color_of(2), markersize=13, label="chosen")
    axes.set(xlabel="operations a score beside the matrix products, mean of the layers", ylabel="quality, 1 is softmax")
    axes.margins(x=0.08, y=0.14)
    legend_below(figure, axes)
    return figure


@styled
def draw_fits(reports: Sequence[Any]) -> Any:
    """Returns a figure of `CalibrationReport`s: what is left unexplained of softmax's outputs, and of the row sums.

    Lines are means over heads, bands reach from the best head to the worst.
    """
    figure, ((left, right),) = canvas(1, 2, 10.5, 4.2)
    for number, report in enumerate(reports):
        layers, color = range(len(report.layers)), color_of(number)
        missing = [[max(1.0 - value, 1e-7) for value in layer.explained_variance] for layer in report.layers]
        left.plot(layers, [sum(own) / len(own) for own in missing], "o-", color=color, label=report.spec)
        low, high = [min(own) for own in missing], [max(own) for own in missing]
        left.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
        residual = [sum(layer.residual) / len(layer.residual) for layer in report.layers]
        right.plot(layers, residual, "o-", color=color)
    spread = [sum(layer.spread) / len(layer.spread) for layer in reports[0].layers]
    right.plot(range(len(spread)), spread, "o--", color=INK, label="before the row shift")
    left.set(title="Not explained of softmax's outputs", ylabel="1 − explained variance", yscale="log")
    right.set(title="Left of the rows' log partition sums", ylabel="standard deviation, nats", ylim=(0, None))
    right.legend(loc="best")
    for axes in (left, right):
        axes.set_xlabel("patched layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    legend_below(figure, left, columns=6)
    return figure
