"""The pictures of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_polyattn.figures.style import INK, SERIES, canvas, color_of, legend_below, save, styled

LEAST_NORM = 1e-3  # that is drawn, of √N: an arm without attention would press the others together


@styled
def plot_stages(specs: Mapping[str, Any], quality: str, path: Path) -> None:
    """Draws, for each spec, how far its quality is from softmax's at each stage and, if timed, its cost, as a PNG.

    Args:
        specs: the arms of all_results.json.
        quality: the measure to draw; softmax has the value that it should reach.
        path: of the PNG file.
    """
    finals = {spec: result["stages"]["finetuned"] for spec, result in specs.items()}
    timed = all("latency_ms" in values for values in finals.values())
    figure, ((left, *rest),) = canvas(1, 2, 10.5, 4.2, width_ratios=(3, 2)) if timed else canvas(1, 1, 7.0, 4.2)
    for number, (spec, result) in enumerate(specs.items()):
        stages = {name: values for name, values in result["stages"].items() if name != "softmax"}
        goal = result["stages"]["softmax"][quality]
        distances = [max(abs(goal - values[quality]), 1e-7) for values in stages.values()]
        left.plot(list(stages), distances, "o-", color=color_of(number), label=spec)
    left.set(title="Quality: lower is closer to softmax", yscale="log", ylabel=f"|softmax − model| in {quality}")
    legend_below(figure, left)
    if timed:
        _draw_costs(rest[0], finals)
    save(figure, path)


def _draw_costs(axes: Any, finals: Mapping[str, Mapping[str, float]]) -> None:
    ratios = [values["latency_ms"] / values["softmax_latency_ms"] for values in finals.values()]
    bars = axes.bar(list(finals), ratios, 0.6, color=[color_of(number) for number in range(len(finals))])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axhline(1.0, color=INK, linestyle="--", linewidth=1.2)
    axes.set(title="Cost: 1 is softmax, lower is faster", ylabel="time / time of softmax")
    axes.margins(y=0.14)
    axes.grid(visible=False, axis="x")


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


@styled
def plot_norms(arms: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], path: Path) -> None:
    """Draws the norms of attention, of its Jacobian and of the gradient against the steps, as a PNG.

    Lines are means over the seeds, bands reach from the lowest to the highest; the bounds of Theorem 4.1 of arXiv
    2410.18613 for softmax are dashed.

    Args:
        arms: title -> for each seed, what `scratch_card.followed` returns, as far as all seeds came.
        path: of the PNG file.
    """
    figure, (panels,) = canvas(1, 3, 13.0, 4.8)
    shown = (
        ("attention_norm", "‖A‖_F / √N, largest layer and head", 1.0),
        ("jacobian_norm", "‖∇A‖_F / √N, largest layer and head", 2.0),
        ("grad_norm", "norm of the gradient of all weights", None),
    )
    for axes, (name, title, bound) in zip(panels, shown, strict=True):
        for number, (label, seeds) in enumerate(arms.items()):
            points = list(zip(*seeds, strict=False))
            steps = [point[0]["step"] for point in points]
            values = [[seed[name] for seed in point] for point in points]
            color = color_of(number - 1) if number else INK  # the first is softmax
            style = ("-", "--", ":")[max(0, number - 1) // len(SERIES) % 3]
            axes.plot(steps, [sum(v) / len(v) for v in values], style, color=color, label=label.replace("`", ""))
            axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, lw=0)
        if bound is not None:
            axes.axhline(bound, color=INK, linestyle=":", linewidth=1.4, label="bound of Theorem 4.1 for softmax")
        axes.set(title=title, xlabel="training steps", yscale="log")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], LEAST_NORM))
    legend_below(figure, panels[0])
    save(figure, path)
