"""How much faster than softmax the operator is, case by case."""

from __future__ import annotations

from typing import Any

from .style import GRID, INK, canvas, color_of, legend_below, styled

_TITLES = {"forward": "forward", "forward_backward": "forward + backward"}


@styled
def draw_speedups(results: dict[str, Any]) -> Any:
    """Returns a figure of the bars of every case in bench.json's `rows`, a panel for each dtype and pass.

    A short line over each case is what one large matrix product would allow; where that is far above all bars, its
    number stands for it, so that the bars keep their height.
    """
    rows = results["rows"]
    dtypes = sorted({row["dtype"] for row in rows})
    specs = list(dict.fromkeys(row["spec"] for row in rows))
    figure, axes = canvas(len(_TITLES), len(dtypes), 6.6 * len(dtypes), 7.4)
    for line, kind in enumerate(_TITLES):
        for column, dtype in enumerate(dtypes):
            own = [row for row in rows if row["dtype"] == dtype and kind in row]
            _draw(axes[line][column], own, kind, specs)
            axes[line][column].set_title(f"{_TITLES[kind]}, {dtype}")
        axes[line][0].set_ylabel("times the speed of softmax")
    legend_below(figure, axes[0][0], columns=3 * len(dtypes))
    figure.suptitle(results["device"])
    return figure


def _draw(axes: Any, rows: list[dict[str, Any]], kind: str, specs: list[str]) -> None:
    cases = list(dict.fromkeys(row["case"] for row in rows))
    width = 0.8 / max(1, len(specs))
    for number, spec in enumerate(specs):
        own = [row for row in rows if row["spec"] == spec]
        places = [cases.index(row["case"]) + width * (number - (len(specs) - 1) / 2) for row in own]
        axes.bar(places, [row[kind]["speedup"] for row in own], 0.9 * width, color=color_of(number), label=spec)
    axes.axhline(1.0, color=GRID, linestyle="--", linewidth=1.2, label="softmax")
    top = _top([row[kind]["speedup"] for row in rows], [row[kind]["limit_speedup"] for row in rows])
    label: str | None = "limit: one large matrix product"
    for place, case in enumerate(cases):
        limit = next(row[kind]["limit_speedup"] for row in rows if row["case"] == case)
        if limit <= top:
            axes.plot([place - 0.44, place + 0.44], [limit] * 2, color=INK, linewidth=2, label=label)
            label = None
        else:
            axes.text(place, 0.99 * top, f"limit {limit:.0f} × ↑", ha="center", va="top", fontsize=8)
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right", fontsize=8)
    axes.set_ylim(0.0, top)
    axes.grid(visible=False, axis="x")


def _top(speedups: list[float], limits: list[float]) -> float:
    """Returns the height of a panel: of all bars, and of the limits within twice the tallest one."""
    tallest = max([*speedups, 1.0])
    return 1.15 * max([tallest, *(limit for limit in limits if limit <= 2.2 * tallest)])
