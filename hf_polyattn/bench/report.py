"""The results for people: tables. `figures.speed` draws them."""

from __future__ import annotations

from typing import Any

from ..tables import format_table


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
        (
            f"{row['model']} {row['batch']} × {row['length']}",
            row["dtype"],
            row["spec"],
            *(f"{row[kind]['latency']:.2f}" for kind in ("infer", "train")),
        )
        for row in results["models"]
    ]
    if latencies:
        parts += [
            "\nwhole models: time divided by softmax's",
            format_table(("model", "dtype", "polynomial", "inference", "training step"), latencies),
        ]
    tokens = [
        (f"{row['model']}, {row['cached']} cached", row["dtype"], row["spec"], f"{row['latency']:.2f}")
        for row in results.get("decode", ())
    ]
    if tokens:
        parts += [
            "\none token after many: time divided by softmax's",
            format_table(("model", "dtype", "polynomial", "token"), tokens),
        ]
    waits = [
        (row["model"], row["dtype"], row["spec"], f"{row['ms'] / 1e3:.1f}", f"{row['passes']:.1f}")
        for row in results.get("calibration", ())
    ]
    if waits:
        parts += [
            "\ncalibration: seconds, and in passes of softmax over the same batches",
            format_table(("model", "dtype", "polynomial", "seconds", "passes"), waits),
        ]
    for row in results["memory"]:
        peaks = ", ".join(f"{name} {peak:.0f}" for name, peak in row["mib"].items())
        parts.append(f"\npeak of extra memory, forward and backward, {row['case']} {row['dtype']}, in MiB: {peaks}")
    return "\n".join(parts)


def _cell(times: dict[str, float] | None) -> str:
    return "" if times is None else f"{times['speedup']:.2f} ({times['limit_speedup']:.2f})"
