"""The card of a row of configs/measurements.yaml, from what `measure.py` wrote into its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_polyattn.hub.card_template import TAGS, fill_template, introduction, markdown_table

CONTROL = "control"
START = "start"  # an arm of softmax, if a row has it, that the others start from
TASKS = {
    "causal_lm": "text-generation",
    "text_classification": "text-classification",
    "image_classification": "image-classification",
    "sentence_embedding": "feature-extraction",
    "translation": "translation",
}


def card(name: str, row: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Returns the text of a card, from what its JSON holds."""
    summary, published, seeds = data["summary"], data["published"], max(map(len, data["runs"].values()))
    metric, goal_for, unit = row["metric"], row.get("goals", {}), row.get("unit", "percent")
    references = {}
    if CONTROL in summary:
        references["against the control"] = summary[CONTROL][metric]["mean"]
    rows = []
    if published is not None:
        changed = [change(published[metric], reference, unit) for reference in references.values()]
        references["against the published checkpoint"] = published[metric]
        rows.append(["softmax, as published", f"{published[metric]:.4f}", *changed, "", ""])
    for arm, own in summary.items():
        value = own[metric]
        spread = f" ± {(value['highest'] - value['lowest']) / 2:.4f}"
        if value["seeds"] == 1:
            spread = "" if untrained(row["arms"][arm]) else " (one seed)"
        changed = [change(value["mean"], reference, unit) for reference in references.values()]
        if arm == CONTROL:
            changed[0] = ""
        rows.append([row["arms"][arm]["title"], f"{value['mean']:.4f}{spread}", *changed, goal_for.get(arm, "")])
    table = markdown_table(["arm", metric, *references, "wanted"], rows)
    arms = "\n".join(f"- {row['arms'][arm]['title']}: `{words(row['arms'][arm]['words'])}`" for arm in summary)
    if "curves" in data:
        table += "\n\n" + curves(name, row, data["curves"])
    measured = (
        f"{row['metric_meaning']}: mean of {seeds} seeds on held-out data, ± half the range between them. Every "
        f"trained arm had the same budget:\n{row['budget']}, on {devices(data)}."
    )
    if CONTROL in summary:
        measured += " What was wanted is against the control."
    adaptation = (
        f"`recipes/{row['recipe']}.py`, all arms with `{words(row['words'])}`, and\n\n{arms}\n\n"
        f"All figures are in [{name}.json]({name}.json): every stage of every seed, with versions and device. It was "
        f"written by\n\n```bash\npython recipes/measure.py {name} --checkpoints <folder of the checkpoints> "
        "--datasets <folder of the data sets>\n```"
    )
    return str(
        fill_template(
            metadata(row, summary),
            title=row["title"],
            introduction=introduction(row["base_model"]),
            measured=f"{measured}\n\n{table}\n\n{row['remarks'].strip()}",
            adaptation=adaptation,
            limits="- No weights are published here; the commands above make them.\n"
            "- The figures are of one small budget on one data set.",
            auto_class=row["auto_class"],
            repository="<the arm's model folder>",
        )
    )


def devices(data: Mapping[str, Any]) -> str:
    """Returns what the runs of a row ran on."""
    found = [run["device"] for runs in data["runs"].values() for run in runs if "device" in run]
    names = {one["name"] if one["type"] == "cuda" else f"a CPU ({one['name']})" for one in found}
    return " and ".join(sorted(names)) or "a device that is not known"


def curves(name: str, row: Mapping[str, Any], points: Mapping[str, list[tuple[int, float]]]) -> str:
    """Returns the section of a card on longer training: its picture, and where each arm ended."""
    reference, unit = points[CONTROL][-1][1], row.get("unit", "percent")
    rows = []
    for arm, own in points.items():
        tokens, value = own[-1]
        against = "" if arm == CONTROL else change(value, reference, unit)
        rows.append([row["arms"][arm]["title"], f"{tokens / 1e6:.2f} M", f"{value:.4f}", against])
    table = markdown_table(["arm", "tokens", row["metric"], "against the control"], rows)
    return (
        f"Trained for longer, with one seed and `{words(row['curve']['words'])}`:\n\n"
        f"![{row['metric']} on held-out data against the tokens spent]({name}.png)\n\n{table}"
    )


def change(value: float, reference: float, unit: str) -> str:
    """Returns how far a value is from another: in percent of it, in points (hundredths), or the difference."""
    if unit == "points":
        return f"{100 * (value - reference):+.2f} points"
    return f"{value - reference:+.4f}" if unit == "difference" else f"{100 * (value / reference - 1):+.2f} %"


def metadata(row: Mapping[str, Any], summary: Mapping[str, Any]) -> ModelCardData:
    """Returns the metadata of a card: what it is of, and one result a polynomial arm."""
    task, metric, dataset = TASKS[row["recipe"]], row["metric"], row.get("dataset", "pydoc_data.topics")
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric,
            metric_name=f"{metric}, {row['arms'][arm]['title']}",
            metric_value=round(own[metric]["mean"], 6),
        )
        for arm, own in summary.items()
        if arm not in (CONTROL, START) and metric in own
    ]
    specs = dict.fromkeys(row["arms"][arm]["words"]["spec"] for arm in summary)
    return ModelCardData(
        library_name="transformers",
        base_model=row.get("base_model"),
        base_model_relation="finetune" if "base_model" in row else None,
        license=row["license"],
        datasets=[dataset],
        metrics=[metric],
        pipeline_tag=task,
        tags=[*TAGS, *(spec for spec in specs if spec != "softmax")],
        model_name=row["title"],
        eval_results=results,
    )


def words(values: Mapping[str, Any]) -> str:
    return " ".join(f"--{name} {value}" for name, value in values.items())


def untrained(arm: Mapping[str, Any]) -> bool:
    return arm["words"].get("max_steps") == 0
