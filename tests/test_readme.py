"""The figures of the README are those of the JSON files that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from readme import written

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def read(file: str) -> Any:
    return json.loads((ROOT / file).read_text())


def test_links_lead_to_files_that_are_there() -> None:
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", README)
    assert "benchmarks/demo.png" in links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_figures_are_those_of_the_files() -> None:
    """If not, `python tests/readme.py --write` makes them so."""
    assert written(README) == README


@pytest.mark.parametrize(
    "digit", re.findall(r"\d\.\d+e-\d|(?<=takes )\d\.\d\d|(?<=\| )\d\.\d\d / \d\.\d\d", README)[::5]
)
def test_another_figure_would_be_written_over(digit: str) -> None:
    assert written(README.replace(digit, digit.replace(digit[0], "9"), 1)) == README


def test_what_loses_is_counted() -> None:
    """The sentence on whole models says of how many cases it is true, by dtype."""
    rows = [row for row in read("benchmarks/cpu_models.json")["models"] if "calibrated" in row["spec"]]
    for dtype, name in (("bfloat16", "in bf16"), ("float32", "in fp32, the default,")):
        times = [row["infer"]["latency"] for row in rows if row["dtype"] == dtype and row["batch"] > 1]
        gain = sum(time < 1.0 for time in times)
        sentence = " ".join(README[README.index("Whole models, calibrated,") :].split("\n\n")[0].split())
        part = sentence[sentence.index(name) :]
        assert re.search(r"a batch (\S+) \((\d+) of (\d+)\)", part).groups() == (  # type: ignore[union-attr]
            f"{min(times):.2f}–{max(times):.2f}",
            str(gain),
            str(len(times)),
        )


def test_the_first_code_runs_as_it_stands(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the Hub's name the embedded copy is taken, and fewer sentences; what it saves is what the explorer opens."""
    from transformers import AutoModel

    from hf_polyattn.explore import Session

    monkeypatch.chdir(tmp_path)
    code = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[0]
    name = "sentence-transformers/all-MiniLM-L6-v2"
    assert name in code
    names: dict[str, Any] = {}
    exec(code.replace(name, str(checkpoint("minilm"))).replace("256", "16"), names)
    opened = Session("minilm-poly6", "cpu")
    assert opened.spec == "poly6-l1"
    inputs = names["tokenizer"](["A dog runs over the grass."], return_tensors="pt")
    softmax = AutoModel.from_pretrained(checkpoint("minilm")).eval()(**inputs).last_hidden_state.mean(1)
    kept = torch.cosine_similarity(opened.model(**inputs).last_hidden_state.mean(1), softmax)
    assert 0.99 < float(kept.detach()) < 1.0


def test_adaptation() -> None:
    rows = re.findall(r"^\| \[.*?\]\(model_cards/(.*?)\.md\) \|(.*)\|$", README, re.M)
    assert {name for name, _ in rows} == {
        file.stem for file in (ROOT / "model_cards").glob("*.json") if not file.stem.startswith("from-scratch")
    }
    for name, cells in rows:
        data = read(f"model_cards/{name}.json")
        summary = {arm: next(iter(measures.values()))["mean"] for arm, measures in data["summary"].items()}
        control = summary["control"] if "control" in summary else next(iter(data["published"].values()))
        expected = [control, *(summary[arm] for arm in ("lossless", "normalised", "paper", "refined", "bare"))]
        assert [float(cell.split()[0]) for cell in cells.split("|")] == [round(value, 4) for value in expected]
