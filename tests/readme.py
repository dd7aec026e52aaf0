"""Writes the figures of README.md again from the JSON files that it names: `python tests/readme.py --write`.

For when `tests/quality.py --write`, `make demo` or `polyattn bench` have measured again. The table of fine-tuning is of
model_cards/, one row a card, and is not written here; tests/test_readme.py holds it, and all of these, to their files.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 128
CHECKPOINTS = ("minilm", "gpt2-zinc", "gpt2-tinystories", "llama", "vit")
SPECS = ("softmax", "poly3", "poly3~1", "poly4-l1", "poly6-l1", "poly3^16-l1")


def read(file: str) -> Any:
    """Returns what a JSON file of the project holds."""
    return json.loads((ROOT / file).read_text())


def distance(cosine: float) -> str:
    """Returns 1 − a cosine with two digits, such as 7.5e-6."""
    lacking = 1.0 - cosine
    return re.sub(r"e([-+])0", r"e\1", f"{lacking:.1e}") if lacking else "0"


def calibration() -> list[list[str]]:
    """Returns the cells of the table of the dial, without its first column."""
    checkpoints = read("benchmarks/calibration.json")["checkpoints"]
    rows = []
    for name in CHECKPOINTS:
        ((measure, _),) = list(checkpoints[name]["softmax"].items())[:1]
        shown = distance if measure == "cosine" else "{:.4f}".format
        rows.append([shown(checkpoints[name][spec][measure]) for spec in SPECS])
    return rows


def demo() -> str:
    """Returns the sentence on what the demo's training does to two polynomials, and which of them it makes worse."""
    arms, said = read("benchmarks/demo.json")["arms"], []
    for spec in ("poly3", "poly6-l1"):
        calibrated, trained = (arms[spec]["stages"][stage]["cosine"] for stage in ("calibrated", "finetuned"))
        verdict = "" if trained > calibrated else ", better left alone"
        said.append(f"from {distance(calibrated)} to {distance(trained)} for `{spec}`{verdict}")
    return f"Training takes 1 − cosine {', '.join(said)}."


def speed() -> list[list[str]]:
    """Returns the cells of the table of the operator's speed, without its first column."""
    measured: dict[tuple[Any, ...], dict[tuple[str, str], Any]] = {}
    for row in read("benchmarks/cpu.json")["rows"]:
        case = tuple(row[name] for name in ("batch", "heads", "kv_heads", "length", "head_dim", "queries", "causal"))
        measured.setdefault(case, {})[row["dtype"], row["spec"]] = row
    rows = []
    for timed in measured.values():
        cells = []
        for dtype in ("bfloat16", "float32"):
            cubic, l1 = (timed[dtype, f"{spec} calibrated"] for spec in ("poly3", "poly6-l1"))
            for row, figure, digits in ((cubic, "speedup", 2), (l1, "speedup", 2), (l1, "limit_speedup", 1)):
                passes = [row[name] for name in ("forward", "forward_backward") if row.get(name)]
                cells.append(" / ".join(f"{one[figure]:.{digits}f}" for one in passes))
        rows.append(cells)
    return rows


def models() -> str:
    """Returns the sentence on whole models: what a range is of, and in how many of its cases softmax is slower."""
    rows = [row for row in read("benchmarks/cpu_models.json")["models"] if "calibrated" in row["spec"]]
    said = []
    for dtype, name in (("bfloat16", "bf16"), ("float32", "fp32, the default,")):
        own = [row for row in rows if row["dtype"] == dtype]
        single, batches = ([row for row in own if (row["batch"] > 1) is more] for more in (False, True))
        parts = (
            (f"in {name} one example takes", [row["infer"]["latency"] for row in single]),
            ("a batch", [row["infer"]["latency"] for row in batches]),
            ("a training step", [row["train"]["latency"] for row in own]),
        )
        said.append(", ".join(f"{what} {spread(times)}" for what, times in parts))
    return (
        "Whole models, calibrated, as multiples of softmax's time ([cpu_models.json](benchmarks/cpu_models.json), in "
        f"brackets how many cases gain): {'; '.join(said)}."
    )


def gpu() -> str:
    """Returns the sentence on what calibrated polynomials are beside the fastest softmax of a GPU."""
    results = read("benchmarks/h200.json")
    said = []
    for kind, decoding, name in (
        ("forward", False, "forward"),
        ("forward_backward", False, "with backward"),
        ("forward", True, "decoding"),
    ):
        rows = [row for row in results["rows"] if (row["queries"] is not None) is decoding]
        found = []
        for spec in ("poly3", "poly6-l1"):
            times = [row[kind]["speedup"] for row in rows if row["spec"] == f"{spec} calibrated"]
            found.append(f"{min(times):.2f}–{max(times):.2f}" if len(times) > 1 else f"{times[0]:.2f}")
        said.append(f"{name} {found[0]} ({found[1]})")
    device = results["device"].removeprefix("NVIDIA ")
    return (
        f"- GPUs are the weak side: on an {device} in bf16 `poly3` (`poly6-l1`) has, of the fastest softmax's speed, "
        f"{', '.join(said)} ([h200.json](benchmarks/h200.json))."
    )


def spread(times: Sequence[float]) -> str:
    """Returns the range of some times, and how many of them are below 1."""
    return f"{min(times):.2f}–{max(times):.2f} ({sum(time < 1.0 for time in times)} of {len(times)})"


#: The first words of each sentence, up to which it is replaced, and what it says now.
SENTENCES: dict[str, Callable[[], str]] = {
    "Training takes 1 − cosine": demo,
    "Whole models, calibrated,": models,
    "- GPUs are the weak side": gpu,
}
#: The first cells of each table's header, and its cells now.
TABLES: dict[str, Callable[[], list[list[str]]]] = {"| | softmax | `poly3` |": calibration, "| batch, heads,": speed}


def written(readme: str) -> str:
    """Returns the README with the figures of the files; its sentences of figures are the last of their paragraphs."""
    for beginning, sentence in SENTENCES.items():
        start = readme.index(f"\n{beginning}") + 1
        end = readme.index("\n\n", start)
        indent = "  " if beginning.startswith("- ") else ""
        lines = textwrap.wrap(
            sentence(), WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        readme = readme[:start] + "\n".join(lines) + readme[end:]
    for beginning, rows in TABLES.items():
        start = readme.index(f"\n{beginning}") + 1
        end = readme.index("\n\n", start)
        header, rule, *old = readme[start:end].splitlines()
        readme = readme[:start] + "\n".join([header, rule, *_rows(old, rows())]) + readme[end:]
    return readme


def _rows(old: Iterable[str], cells: Iterable[Sequence[str]]) -> list[str]:
    first = [row.split(" | ")[0] for row in old]
    return [f"{name} | {' | '.join(row)} |" for name, row in zip(first, cells, strict=True)]


if __name__ == "__main__":
    README = ROOT / "README.md"
    text = written(README.read_text())
    if "--write" in sys.argv:
        README.write_text(text)
    else:
        sys.exit(
            "README.md has the figures of the files" if text == README.read_text() else "python tests/readme.py --write"
        )
