"""The results for people: tables and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..tables import format_table
from .cases import SPECS


def tables(results: dict[str, Any]) -> str:
    """Returns the results as tables for a terminal."""
    parts = []
    rows = [
        (row["case"], row["dtype"], row["spec"], *(_cell(row.get(kind)) for kind in ("forward", "forward_backward")))
        for row in results["rows"]
    ]
    if rows:
        parts += [
            "times softmax's speed (and what it would be at the rate of one large matrix product)",
            format_table(("case", "dtype", "polynomial", "forward", "forward+backward"), rows),
        ]
    latencies = [
        (row["model"], row["dtype"], row["spec"], *(f"{row[kind]['latency']:.2f}" for kind in ("infer", "train")))
        for row in results["models"]
    ]
    if latencies:
        parts += [
            "\nwhole models: time divided by softmax's",
            format_table(("model", "dtype", "polynomial", "inference", "training step"), latencies),
        ]
    for row in results["memory"]:
        peaks = ", ".join(f"{name} {peak:.0f}" for name, peak in row["mib"].items())
        parts.append(f"\npeak of extra memory, forward and backward, {row['case']} {row['dtype']}, in MiB: {peaks}")
    return "\n".join(parts)


def _cell(times: dict[str, float] | None) -> str:
    return "" if times is None else f"{times['speedup']:.2f} ({times['limit_speedup']:.2f})"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the forward and forward+backward speedups of every case as bars; needs matplotlib."""
    from matplotlib.figure import Figure

    kinds = ("forward", "forward_backward")
    dtypes = sorted({row["dtype"] for row in results["rows"]})
    figure = Figure(figsize=(7 * len(dtypes), 7), layout="constrained")
    axes = figure.subplots(len(kinds), len(dtypes), squeeze=False)
    for line, kind in enumerate(kinds):
        for column, dtype in enumerate(dtypes):
            axis = axes[line][column]
            rows = [row for row in results["rows"] if row["dtype"] == dtype and kind in row]
            cases = list(dict.fromkeys(row["case"] for row in rows))
            for offset, spec in enumerate(SPECS):
                own = [row for row in rows if row["spec"] == str(spec)]
                places = [cases.index(row["case"]) + 0.2 * (offset - 1.5) for row in own]
                axis.bar(places, [row[kind]["speedup"] for row in own], 0.18, label=str(spec))
            limits = {row["case"]: row[kind]["limit_speedup"] for row in rows}
            for place, case in enumerate(cases):
                axis.plot([place - 0.4, place + 0.4], [limits[case]] * 2, color="black", linewidth=1)
            axis.axhline(1.0, color="gray", linewidth=0.8, linestyle="--")
            axis.set_xticks(range(len(cases)), cases, rotation=25, ha="right", fontsize=7)
            axis.set_title(f"{kind.replace('_', ' + ')}, {dtype}")
            axis.set_ylabel("times softmax's speed")
    axes[0][0].legend(fontsize=7, title="black line: one large matrix product")
    figure.suptitle(results["device"])
    figure.savefig(path, dpi=120)
