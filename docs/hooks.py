"""What the documentation takes from the project when it is built: pictures, and tables of measured figures.

`<!-- table: NAME -->` on a page becomes the table that `TABLES` makes of the JSON files in benchmarks/ and
model_cards/. Pictures stay where the commands that draw them write them; they are in the site under their paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PICTURES = (
    "benchmarks/demo.png",
    "benchmarks/cpu.png",
    "benchmarks/h200.png",
    "model_cards/from-scratch-lm.png",
    "model_cards/from-scratch-translation.png",
    "model_cards/from-scratch-vit.png",
    "model_cards/llama-stories260K.png",
)
PRIVATE = "private_inference.md"
_MARK = re.compile(r"^<!-- table: (?P<name>[\w-]+) -->$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Puts a page that may be there into the navigation."""
    if (ROOT / "docs" / PRIVATE).is_file() and PRIVATE not in str(config.nav):
        guides = next(part["Guides"] for part in config.nav if isinstance(part, dict) and "Guides" in part)
        guides.append(PRIVATE)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pictures that stand elsewhere in the project."""
    from mkdocs.structure.files import File

    for path in PICTURES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts tables in the place of their marks."""
    return _MARK.sub(lambda mark: TABLES[mark["name"]](), markdown)


def read(path: str) -> Any:
    """Returns what a JSON file of the project holds."""
    return json.loads((ROOT / path).read_text())


def distance(cosine: float) -> str:
    """Returns 1 − a cosine: next to 1 its digits are all that differs."""
    return f"{1.0 - cosine:.1e}" if cosine != 1.0 else "0"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


_MEASURES = {
    "minilm": "MiniLM: 1 − cosine to the softmax embedding",
    "gpt2-zinc": "gpt2-zinc: NLL, nats a token",
    "gpt2-tinystories": "gpt2-tinystories: NLL, nats a token",
    "llama": "llama-stories260K: NLL, nats a token",
    "vit": "vit-tiny: 1 − cosine of the logits",
}


def calibration() -> str:
    """Returns what calibration alone keeps, by checkpoint and spec."""
    checkpoints = read("benchmarks/calibration.json")["checkpoints"]
    specs = list(next(iter(checkpoints.values())))
    rows = []
    for name, meaning in _MEASURES.items():
        shown = distance if "cosine" in meaning else "{:.4f}".format
        rows.append([meaning, *(shown(next(iter(checkpoints[name][spec].values()))) for spec in specs)])
    return table(["", *(spec if spec == "softmax" else f"`{spec}`" for spec in specs)], rows)


def demo() -> str:
    """Returns the stages of the demo."""
    rows = []
    for spec, arm in read("benchmarks/demo.json")["arms"].items():
        for stage, values in arm["stages"].items():
            if stage in ("softmax", "reloaded"):
                continue
            far = [distance(values[name]) for name in ("cosine", "similarity_correlation")]
            cost = values["latency_ms"] / values["softmax_latency_ms"]
            rows.append([f"`{spec}`", stage, *far, f"{values['neighbour_agreement']:.4f}", f"{cost:.2f}"])
    header = ["polynomial", "stage", "1 − cosine", "1 − similarity correlation", "same nearest neighbour"]
    header.append("time / softmax's")
    return table(header, rows)


def speed(file: str = "benchmarks/cpu.json") -> str:
    """Returns the speed of the operator beside softmax, case by case."""
    rows = []
    for row in read(file)["rows"]:
        cells = []
        for kind in ("forward", "forward_backward"):
            timed = row.get(kind)
            cells += [f"{timed['speedup']:.2f}", f"{timed['limit_speedup']:.1f}"] if timed else ["", ""]
        rows.append([row["case"], row["dtype"], row["spec"], *cells])
    header = ["case", "dtype", "polynomial", "forward", "its limit", "forward + backward", "its limit"]
    return table(header, rows)


def models() -> str:
    """Returns the time of whole models divided by softmax's."""
    rows = [
        [
            f"{row['model']}, {row['batch']} × {row['length']}",
            row["dtype"],
            row["spec"],
            *(f"{row[kind]['latency']:.2f}" for kind in ("infer", "train")),
        ]
        for row in read("benchmarks/cpu_models.json")["models"]
    ]
    return table(["model", "dtype", "polynomial", "inference", "training step"], rows)


def cards() -> str:
    """Returns what every arm of every card came to."""
    rows = []
    for path in sorted((ROOT / "model_cards").glob("*.json")):
        data = json.loads(path.read_text())
        for arm, measures in data.get("summary", {}).items():
            name, value = next(iter(measures.items()))
            spread = "" if value["seeds"] == 1 else f" ± {(value['highest'] - value['lowest']) / 2:.4f}"
            rows.append([path.stem, arm, name, f"{value['mean']:.4f}{spread}", str(value["seeds"])])
    return table(["card", "arm", "measure", "mean ± half the range", "seeds"], rows)


def scratch(name: str) -> str:
    """Returns what the card of a row from scratch says of its arms, with its picture."""
    card = (ROOT / f"model_cards/from-scratch-{name}.md").read_text()
    measured = card.partition("\n## Measured\n")[2].partition("\n## ")[0].strip()
    return measured.replace(f"](from-scratch-{name}.png)", f"](../model_cards/from-scratch-{name}.png)")


def families() -> str:
    """Returns how many families of Transformers are patched, refused or too large to try."""
    counts = read("benchmarks/sweep.json")["counts"]
    return table(["what became of it", "families"], [[status, str(count)] for status, count in counts.items()])


def private() -> str:
    """Returns where private inference is described, if it is."""
    if not (ROOT / "docs" / PRIVATE).is_file():
        return ""
    return f"## Private inference\n\nUnder encryption, without a division: [private inference](../{PRIVATE})."


TABLES: dict[str, Callable[[], str]] = {
    "calibration": calibration,
    "cards": cards,
    "demo": demo,
    "families": families,
    "models": models,
    "private": private,
    **{f"scratch-{name}": partial(scratch, name) for name in ("vit", "lm", "translation")},
    "speed": speed,
    "gpu": lambda: speed("benchmarks/h200.json"),
}
