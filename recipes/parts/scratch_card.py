"""The card of a row whose models are trained from scratch: arms, norms along the way, and the claim as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from hf_polyattn.hub.card_template import fill_template, markdown_table

from .grid import measure_of
from .row_card import CONTROL, change, devices, metadata, words

NORMS = ("attention_norm", "jacobian_norm")  # of `hf_polyattn.Monitor`
CLAIM = (
    "arXiv 2410.18613 says that softmax keeps ‖A‖_F at O(√N), that x³/√N does so too, and that this is why both train "
    "well (Theorem 4.1: at most √N for softmax, and 2√N for its Jacobian)."
)


def followed(log: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Returns loss, gradient norm and the largest norms of any layer at each step that was logged.

    Args:
        log: the log history of an arm that ran with --norms.
    """
    found = []
    for entry in log:
        if "loss" in entry:
            point = {name: float(entry[name]) for name in ("step", "loss", "grad_norm")}
            for norm in NORMS:
                layers = [value for name, value in entry.items() if name.startswith(f"polyattn/{norm}/")]
                point |= {norm: max(layers)} if layers else {}
            found.append(point)
    return found


def diverged(run: Mapping[str, Any]) -> bool:
    """Returns whether a run met a number that is not finite, or ended with a larger loss than it began with."""
    (arm,) = run["arms"].values()
    points = arm["followed"]
    return bool(arm["diverged"] is not None or points[-1]["loss"] > points[0]["loss"])


def scratch_card(name: str, row: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Returns the text of the card of a row from scratch, from what its JSON holds.

    Args:
        name: of the row.
        row: of configs/measurements.yaml, with the reduced budget put in if that was measured.
        data: the JSON.
    """
    options = " --reduced" if data["budget"] == "reduced" else ""
    command = f"python recipes/measure.py {name}{options}"
    places = "--checkpoints <folder of the checkpoints> --datasets <folder of the data sets>"
    arms = "\n".join(f"- {row['arms'][arm]['title']}: `{words(row['arms'][arm]['words'])}`" for arm in data["runs"])
    measured = [
        f"{row['metric_meaning']}: mean over the seeds on held-out data, ± half the range between them. Every arm "
        "started from the weights that softmax started from with its seed, saw the same examples in the same order and "
        f"had the same budget: {row['budget']}, on {devices(data)}.",
        budget(name, data),
        claim(row, data),
        f"{CLAIM} The norms are of the layer and the head where they are largest, in units of √N, estimated on a few "
        "rows of each batch that was logged. *Diverged* is a run that met a number that is not finite, or ended with a "
        "larger training loss than it began with.",
        f"![The norms of attention, of its Jacobian and of the gradient while training]({name}.png)",
    ]
    if data["others"]:
        measured.append(lengths(row, data))
    if data["grid"]:
        measured.append(grid(row, data))
    text = str(
        fill_template(
            metadata(row, data["summary"]),
            title=row["title"],
            introduction="Softmax and polynomials of the attention scores, trained from scratch side by side by "
            "hf_polyattn, as arXiv 2410.18613 does.\nNothing is calibrated, and there is no checkpoint to start from.",
            measured="\n\n".join([*measured, row["remarks"].strip()]),
            adaptation=f"`recipes/{row['recipe']}.py --from_scratch true --norms true`, all arms with "
            f"`{words(row['words'])}`, and\n\n{arms}\n\nAll figures are in [{name}.json]({name}.json): every seed, "
            f"with versions and device. It was written by\n\n```bash\n{command} {places}\n```",
            limits="- No weights are published here; the commands above make them.\n"
            "- The figures are of one small budget on one data set.",
            auto_class=row["auto_class"],
            repository="<the arm's model folder>",
        )
    )
    return text.replace("{checkpoints}", "<folder of the checkpoints>")


def budget(name: str, data: Mapping[str, Any]) -> str:
    """Returns what is said of the budget: a reduced one stands in for another, which is named."""
    if data["budget"] != "reduced":
        return "This is the full budget of the row."
    return (
        "**This is a reduced budget**: smaller models, fewer steps, seeds and arms than the row has. The full one was "
        f"not run; `python recipes/measure.py {name}` without `--reduced` runs it. What holds here need not hold there."
    )


def claim(row: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Returns the table of arms: quality beside softmax's, norms at the end, and how many runs diverged."""
    metric, unit = row["metric"], row.get("unit", "percent")
    rows = []
    for arm, runs in data["runs"].items():
        reference = row["arms"][arm].get("against", CONTROL)
        softmax = data["summary"][reference].get(metric)
        value = data["summary"][arm].get(metric)
        quality = against = "–"
        if value is not None:
            quality = f"{value['mean']:.4f}" + (
                f" ± {(value['highest'] - value['lowest']) / 2:.4f}" if value["seeds"] > 1 else ""
            )
            against = "" if arm == reference or softmax is None else change(value["mean"], softmax["mean"], unit)
        logs = [next(iter(run["arms"].values()))["followed"] for run in runs]
        ends = [log[-1] for log in logs if log]
        norms = [f"{fmean(end[norm] for end in ends):.3g}" if ends else "–" for norm in NORMS]
        lost = f"{sum(map(diverged, runs))} of {len(runs)}"
        rate = f"{data['learning_rates'][arm]:g}"
        rows.append([row["arms"][arm]["title"], quality, against, rate, *norms, lost])
    header = ["arm", metric, "against softmax", "learning rate", "‖A‖_F/√N, end", "‖∇A‖_F/√N, end", "diverged"]
    return markdown_table(header, rows)


def lengths(row: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Returns the table of measures at other lengths than those trained at, each beside softmax's at that length."""
    trained = next(iter(next(iter(data["others"].values()))))  # the first
    sizes = sorted({size for own in data["others"].values() for size in own}, key=int)
    rows = []
    for arm, own in data["others"].items():
        reference = row["arms"][arm].get("against", CONTROL)
        softmax = {} if arm == reference else data["others"].get(reference, {})
        cells = [f"{own[size]:.4f}" if size in own else "–" for size in sizes]
        for number, size in enumerate(sizes):
            if size in own and size in softmax:
                cells[number] += f" ({change(own[size], softmax[size], row.get('unit', 'percent'))})"
        rows.append([row["arms"][arm]["title"], *cells])
    header = ["arm", *(f"{size} tokens" + (", as trained" if size == trained else "") for size in sizes)]
    return (
        f"{row['metric']} of the trained models on blocks of other lengths than they were trained at, in brackets "
        f"against softmax at the same length:\n\n{markdown_table(header, rows)}"
    )


def grid(row: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Returns the table by which learning rates were chosen."""
    rates = list(next(iter(data["grid"].values())))
    rows = [
        [row["arms"][arm]["title"], *(f"{own[rate]:.4f}" if own.get(rate) is not None else "–" for rate in rates)]
        for arm, own in data["grid"].items()
    ]
    text = (
        f"Learning rates were chosen for every arm alike, by {measure_of(row)} with seed {row['grid']['seed']}, which "
        f"no figure above is of, on data that are not those above (`{words(row['grid']['words'])}`):"
    )
    return f"{text}\n\n{markdown_table(['arm', *rates], rows)}"
