"""Cards: every arm and seed is run by its recipe, and the card says what the runs wrote."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

ROOT = Path(__file__).resolve().parents[2]
# The row of the molecules, shortened; what is not named here is as it is measured.
SHORT = {
    "max_train_examples": 48, "max_eval_examples": 6, "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 6, "calibration_batches": 2, "logging_steps": 1, "report_to": "none",
    "disable_tqdm": True, "max_steps": 3,
}  # fmt: skip


def test_card_says_what_the_runs_wrote(
    measure: Any, shared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = yaml.safe_load((ROOT / "recipes/configs/measurements.yaml").read_text())
    row = rows["gpt2-zinc-0.5m"]
    row["words"] |= SHORT
    row["arms"] = {arm: own for arm, own in row["arms"].items() if arm in ("control", "lossless", "aligned", "bare")}
    row["arms"]["aligned"]["words"] |= {"align_steps": 1, "layer_steps": 1}
    row["curve"] = {
        "arms": ["control", "aligned"],
        "words": {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2},
    }
    monkeypatch.setattr(measure, "yaml", SimpleNamespace(safe_load=lambda text: rows))  # not that of model cards
    words = ["--checkpoints", str(shared("checkpoints")), "--datasets", str(shared("datasets")), "--seeds", "0", "1"]
    words += ["--outputs", str(tmp_path / "runs")]
    for _ in range(2):  # nothing is run again the second time
        monkeypatch.setattr(sys, "argv", ["measure.py", "gpt2-zinc-0.5m", *words])
        measure.main()

    assert len(measure.commands) == 2 * 2 + 1 + 1 + 2  # what is not trained has one seed, as have `bare` and curves
    written = json.loads((tmp_path / "cards/gpt2-zinc-0.5m.json").read_text())
    card = (tmp_path / "cards/gpt2-zinc-0.5m.md").read_text()
    for arm, own in written["summary"].items():
        values = [next(iter(run["arms"].values()))["stages"]["reloaded"]["nll"] for run in written["runs"][arm]]
        assert own["nll"]["mean"] == pytest.approx(sum(values) / len(values))
        assert f"| {own['nll']['mean']:.4f}" in card
    lossless, bare = (written["summary"][arm]["nll"]["mean"] for arm in ("lossless", "bare"))
    assert lossless == pytest.approx(written["published"]["nll"], rel=1e-3)
    assert bare > 2.0 * lossless
    aligned = next(iter(written["runs"]["aligned"][0]["arms"].values()))
    assert aligned["spent"]["steps_before"] + aligned["spent"]["steps"] == 3
    tokens, values = zip(*written["curves"]["control"], strict=True)
    (control,) = written["runs"]["curve-control"][0]["arms"].values()
    assert (tokens[0], tokens[2], len(tokens)) == (0, control["spent"]["tokens"], 3)
    assert values[0] == written["published"]["nll"]
    assert values[2] == control["stages"]["finetuned"]["nll"] != values[1]
    assert len(written["curves"]["aligned"]) == 3  # at the end, too
    assert written["curves"]["aligned"][0][0] > 0  # alignment has spent some
    assert written["summary"].keys() == {"control", "lossless", "aligned", "bare"}
    assert f"without dropout, on a CPU ({platform.machine()})." in card
    assert (tmp_path / "cards/gpt2-zinc-0.5m.png").read_bytes().startswith(b"\x89PNG")
    assert "](gpt2-zinc-0.5m.png)" in card
    assert "{" not in card.replace("{#", "")
    for folder in (shared("checkpoints"), tmp_path):
        assert str(folder) not in card + json.dumps(written)

    (tmp_path / "cards/gpt2-zinc-0.5m.md").write_text("lost")
    monkeypatch.setattr(sys, "argv", ["measure.py", "gpt2-zinc-0.5m", "--card-only"])
    measure.main()
    assert (tmp_path / "cards/gpt2-zinc-0.5m.md").read_text() == card


def test_cards_hold_what_their_json_files_hold(measure: Any) -> None:
    """The committed cards are those that the committed results make."""
    rows = yaml.safe_load((ROOT / "recipes/configs/measurements.yaml").read_text())
    cards = sorted((ROOT / "model_cards").glob("*.json"))
    assert cards
    for file in cards:
        data = json.loads(file.read_text())
        text = measure.card(file.stem, rows[file.stem], data)
        assert file.with_suffix(".md").read_text() == text
        metadata: Any = ModelCard(text).data
        metric = rows[file.stem]["metric"]
        measured = {arm: own[metric]["mean"] for arm, own in data["summary"].items() if metric in own}
        measured = {arm: value for arm, value in measured.items() if arm not in (measure.CONTROL, measure.START)}
        assert [result.metric_value for result in metadata.eval_results] == pytest.approx(
            [*measured.values()], abs=1e-6
        )
        scratch = "grid" in rows[file.stem]
        assert {"polynomial-attention", "poly3" if scratch else "poly3^16-l1"} <= set(metadata.tags)
        relation = None if scratch else "finetune"
        assert metadata.license == rows[file.stem]["license"]
        assert getattr(metadata, "base_model_relation", None) == relation


@pytest.mark.parametrize(
    ("name", "arm", "model"),
    [
        ("vit-tiny-patch16-224", "paper", "row/start-1/softmax/model"),
        ("vit-tiny-patch16-224", "start", "all/vit-tiny-patch16-224"),
        ("all-MiniLM-L6-v2-sst2", "lossless", "row/control-1/softmax/model"),
    ],
)
def test_arms_start_from_the_softmax_model_of_their_seed(
    name: str, arm: str, model: str, measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = yaml.safe_load((ROOT / "recipes/configs/measurements.yaml").read_text())[name]
    commands: list[list[str]] = []
    monkeypatch.setattr(measure, "launch", lambda command, gpu: commands.append(command))
    arguments = argparse.Namespace(row="row", outputs=Path(), checkpoints=Path("all"), datasets=Path("data"), gpu=False)
    measure.run(row, arm, 1, arguments)
    (command,) = commands
    assert command[command.index("--model") + 1] == model


def test_jobs_run_at_once_after_what_they_start_from(
    measure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = yaml.safe_load((ROOT / "recipes/configs/measurements.yaml").read_text())["vit-tiny-patch16-224"]
    barrier, done = threading.Barrier(2), []

    def run(row: Any, arm: str, seed: int, arguments: argparse.Namespace) -> None:
        barrier.wait(timeout=30)  # for the other of the two that run at once
        done.append((arm, seed))

    monkeypatch.setattr(measure, "run", run)
    arguments = argparse.Namespace(
        row="row", outputs=tmp_path / "runs", seeds=[4, 5], arms=["paper", "control", "start"], jobs=2, gpu=False
    )
    measure.measure(row, arguments)
    assert [arm for arm, _ in done][:4] == ["start", "start", "control", "control"]
    assert {(arm, seed) for arm, seed in done} == {(arm, seed) for arm in arguments.arms for seed in arguments.seeds}
    assert not list((tmp_path / "cards").iterdir())  # no card while results are missing


@pytest.mark.parametrize("gpu", [True, False])
def test_runs_take_the_device_that_is_asked_for(gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    launch = importlib.import_module("measure").launch
    file = tmp_path / "seen"
    words = f"import os, pathlib; pathlib.Path({str(file)!r}).write_text(os.environ['ACCELERATE_USE_CPU'])"
    launch([sys.executable, "-c", words], gpu)
    assert file.read_text() == ("false" if gpu else "true")


@pytest.mark.parametrize(
    ("unit", "text"), [("percent", "-1.00 %"), ("points", "-0.90 points"), ("difference", "-0.0090")]
)
def test_changes_are_in_the_unit_of_the_row(measure: Any, unit: str, text: str) -> None:
    assert importlib.import_module("parts.row_card").change(0.891, 0.9, unit) == text


def test_card_of_a_conversion_has_no_control(measure: Any) -> None:
    rows = yaml.safe_load((ROOT / "recipes/configs/measurements.yaml").read_text())
    row = {**rows["gpt2-zinc-0.5m"], "unit": "difference", "metric": "cosine", "goals": {"paper": "≥ 0.99"}}
    summary = {arm: {"cosine": measure.summarize([0.98, 0.99])} for arm in ("paper", "bare")}
    data = {"summary": summary, "published": {"cosine": 1.0}, "runs": {"paper": [{}, {}]}}
    card = measure.card("conversion", row, data)
    assert "| arm | cosine | against the published checkpoint | wanted |" in card
    assert "| softmax, as published | 1.0000 |  |  |" in card
    assert "| 0.9850 ± 0.0050 | -0.0150 | ≥ 0.99 |" in card
