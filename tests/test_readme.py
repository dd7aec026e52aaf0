"""The figures of the README are those of the JSON files that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def read(file: str) -> Any:
    return json.loads((ROOT / file).read_text())


def table(header: str) -> list[list[str]]:
    """Returns the cells below the table row that starts so, without the code marks."""
    lines = README[README.index(f"\n| {header}") :].split("\n\n")[0].strip().splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_links_lead_to_files_that_are_there() -> None:
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", README)
    assert "benchmarks/demo.png" in links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_calibration() -> None:
    names = {"MiniLM": "minilm", "gpt2-zinc": "gpt2-zinc", "gpt2-tinystories": "gpt2-tinystories"}
    names |= {"llama-stories260K": "llama", "vit-tiny": "vit"}
    checkpoints = read("benchmarks/calibration.json")["checkpoints"]
    rows = {name.split(",")[0]: cells for name, *cells in table("| softmax | `poly3`")}
    assert {names[name] for name in rows} == set(checkpoints)
    for name, cells in rows.items():
        specs = ("softmax", "poly3", "poly3~1", "poly4-l1", "poly6-l1", "poly3^16-l1")
        assert cells == [f"{next(iter(checkpoints[names[name]][spec].values())):.4f}" for spec in specs]


def test_speed() -> None:
    measured: dict[str, dict[tuple[str, str], Any]] = {}
    for row in read("benchmarks/cpu.json")["rows"]:
        heads = f"{row['heads']}" + f"/{row['kv_heads']}" * (row["heads"] != row["kv_heads"])
        kind = ", decoding" if row["queries"] else ", causal" if row["causal"] else ""
        case = f"{row['batch']} × {heads} × {row['length']} × {row['head_dim']}{kind}"
        measured.setdefault(case, {})[row["dtype"], row["spec"]] = row
    rows = {case: cells for case, *cells in table("batch, heads, tokens")}
    assert rows.keys() == measured.keys()
    for case, cells in rows.items():
        expected = []
        for dtype in ("bfloat16", "float32"):
            cubic, l1 = (measured[case][dtype, f"{spec} calibrated"] for spec in ("poly3", "poly6-l1"))
            for row, figure, digits in ((cubic, "speedup", 2), (l1, "speedup", 2), (l1, "limit_speedup", 1)):
                passes = [row[name] for name in ("forward", "forward_backward") if row.get(name)]
                expected.append([round(timed[figure], digits) for timed in passes])
        assert [[float(figure) for figure in cell.split(" / ")] for cell in cells] == expected


def test_adaptation() -> None:
    rows = re.findall(r"^\| \[.*?\]\(model_cards/(.*?)\.md\) \|(.*)\|$", README, re.M)
    assert {name for name, _ in rows} == {
        file.stem for file in (ROOT / "model_cards").glob("*.json") if not file.stem.startswith("from-scratch")
    }
    for name, cells in rows:
        data = read(f"model_cards/{name}.json")
        summary = {arm: next(iter(measures.values()))["mean"] for arm, measures in data["summary"].items()}
        control = summary["control"] if "control" in summary else next(iter(data["published"].values()))
        expected = [control, *(summary[arm] for arm in ("lossless", "normalised", "paper", "bare"))]
        assert [float(cell.split()[0]) for cell in cells.split("|")] == [round(value, 4) for value in expected]
