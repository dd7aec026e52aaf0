"""The pictures of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_polyattn.figures.style import INK, canvas, color_of, legend_below, save, styled


@styled
def plot_stages(specs: Mapping[str, Any], quality: str, path: Path) -> None:
    """Draws, for each spec, how far its quality is from softmax's at each stage and what it costs, as a PNG.

    Args:
        specs: the arms of all_results.json.
        quality: the measure to draw; softmax has the value that it should reach.
        path: of the PNG file.
    """
    figure, ((left, right),) = canvas(1, 2, 10.5, 4.2, width_ratios=(3, 2))
    for number, (spec, result) in enumerate(specs.items()):
        stages = {name: values for name, values in result["stages"].items() if name != "softmax"}
        goal = result["stages"]["softmax"][quality]
        distances = [max(abs(goal - values[quality]), 1e-7) for values in stages.values()]
        left.plot(list(stages), distances, "o-", color=color_of(number), label=spec)
    left.set(title="Quality: lower is closer to softmax", yscale="log", ylabel=f"|softmax − model| in {quality}")
    legend_below(figure, left)

    finals = {spec: result["stages"]["finetuned"] for spec, result in specs.items()}
    ratios = [values["latency_ms"] / values["softmax_latency_ms"] for values in finals.values()]
    bars = right.bar(list(finals), ratios, 0.6, color=[color_of(number) for number in range(len(finals))])
    right.bar_label(bars, fmt="%.2f", padding=3)
    right.axhline(1.0, color=INK, linestyle="--", linewidth=1.2)
    right.set(title="Cost: 1 is softmax, lower is faster", ylabel="time / time of softmax")
    right.margins(y=0.14)
    right.grid(visible=False, axis="x")
    save(figure, path)


@styled
def plot_curves(arms: Mapping[str, Sequence[tuple[int, float]]], measure: str, path: Path) -> None:
    """Draws a measure on held-out data against the tokens that each arm had spent by then, as a PNG.

    Args:
        arms: title -> pairs of tokens and measure.
        measure: its name.
        path: of the PNG file.
    """
    figure, ((axes,),) = canvas(1, 1, 7.0, 4.4)
    colors = [INK, *map(color_of, range(len(arms)))] if next(iter(arms)).startswith("softmax") else None
    for number, (title, points) in enumerate(arms.items()):
        tokens, values = zip(*points, strict=True)
        color = colors[number] if colors else color_of(number)
        axes.plot([count / 1e6 for count in tokens], values, "o-", color=color, label=title.replace("`", ""))
    axes.set(xlabel="tokens spent, in millions", ylabel=f"{measure} on held-out data")
    legend_below(figure, axes)
    save(figure, path)
