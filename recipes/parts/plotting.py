"""The pictures of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_stages(specs: Mapping[str, Any], quality: str, path: Path) -> None:
    """Draws, for each spec, how far its quality is from softmax's at each stage and what it costs, as a PNG.

    Args:
        specs: the arms of all_results.json.
        quality: the measure to draw; softmax has the value that it should reach.
        path: of the PNG file.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    for spec, result in specs.items():
        stages = {name: values for name, values in result["stages"].items() if name != "softmax"}
        goal = result["stages"]["softmax"][quality]
        left.plot(
            list(stages), [max(abs(goal - values[quality]), 1e-7) for values in stages.values()], "o-", label=spec
        )
    left.set_yscale("log")
    left.set_ylabel(f"distance to softmax: |softmax − model| in {quality}")
    left.set_title("Quality (lower is closer to softmax)")
    left.legend()
    left.grid(alpha=0.3)

    finals = {spec: result["stages"]["finetuned"] for spec, result in specs.items()}
    ratios = [values["latency_ms"] / values["softmax_latency_ms"] for values in finals.values()]
    right.bar_label(right.bar(list(finals), ratios, color=[f"C{i}" for i in range(len(finals))]), fmt="%.2f", padding=3)
    right.axhline(1.0, color="black", linewidth=1)
    right.set_ylabel("latency / latency of softmax")
    right.set_title("Cost (1 is softmax, lower is faster)")
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def plot_curves(arms: Mapping[str, Sequence[tuple[int, float]]], measure: str, path: Path) -> None:
    """Draws a measure on held-out data against the tokens that each arm had spent by then, as a PNG.

    Args:
        arms: title -> pairs of tokens and measure.
        measure: its name.
        path: of the PNG file.
    """
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for title, points in arms.items():
        tokens, values = zip(*points, strict=True)
        axis.plot([count / 1e6 for count in tokens], values, "o-", markersize=3, label=title.replace("`", ""))
    axis.set_xlabel("tokens spent, in millions")
    axis.set_ylabel(f"{measure} on held-out data")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})
    plt.close(figure)


def plot_norms(arms: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], path: Path) -> None:
    """Draws the norms of attention, of its Jacobian and of the gradient against the steps, as a PNG.

    Lines are means over the seeds, bands reach from the lowest to the highest; the bounds of Theorem 4.1 of arXiv
    2410.18613 for softmax are dashed.

    Args:
        arms: title -> for each seed, what `scratch_card.followed` returns, as far as all seeds came.
        path: of the PNG file.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.8), layout="constrained")
    panels = {
        "attention_norm": ("‖A‖_F / √N, largest layer and head", 1.0),
        "jacobian_norm": ("‖∇A‖_F / √N, largest layer and head", 2.0),
        "grad_norm": ("norm of the gradient of all weights", None),
    }
    for axis, (name, (title, bound)) in zip(axes, panels.items(), strict=True):
        for label, seeds in arms.items():
            points = list(zip(*seeds, strict=False))
            steps = [point[0]["step"] for point in points]
            values = [[seed[name] for seed in point] for point in points]
            (line,) = axis.plot(steps, [sum(v) / len(v) for v in values], label=label.replace("`", ""))
            axis.fill_between(
                steps, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.2
            )
        if bound is not None:
            axis.axhline(bound, color="black", linestyle="--", linewidth=1, label="bound of Theorem 4.1 for softmax")
        axis.set_yscale("log")
        axis.set_xlabel("training steps")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)
