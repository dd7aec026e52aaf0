"""The rows from scratch: the commands of their cards run, shortened, and the cards say what the runs wrote."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from recipe_runs import ROOT, Run

# What stands in for the rows' sizes; all else is as it is measured.
SHORT = {
    "max_train_examples": 12, "max_eval_examples": 4, "per_device_train_batch_size": 2, "logging_steps": 1,
    "per_device_eval_batch_size": 4, "report_to": "none", "disable_tqdm": True, "max_steps": 2,
}  # fmt: skip
ROWS = {
    "from-scratch-vit": "image_size=32 patch_size=16 hidden_size=16 num_hidden_layers=1 num_attention_heads=2 "
    "intermediate_size=16",
    "from-scratch-lm": "n_embd=16 n_layer=1 n_head=2 n_positions=32",
    "from-scratch-translation": "d_model=16 encoder_layers=1 decoder_layers=1 encoder_ffn_dim=16 decoder_ffn_dim=16 "
    "encoder_attention_heads=2 decoder_attention_heads=2 vocab_size=300 max_position_embeddings=32",
}
LLAMA = "vocab_size=2048 hidden_size=16 intermediate_size=16 num_hidden_layers=1 num_attention_heads=2 "
LLAMA += "num_key_value_heads=2 head_dim=8 max_position_embeddings=32"
OWN = {
    "from-scratch-vit": {},
    "from-scratch-lm": {"block_size": 16, "other_block_sizes": "8 32"},
    "from-scratch-translation": {"max_length": 12, "num_beams": 2, "max_eval_examples": 2},
}
# The others of a row differ from these in values alone, and in specs: the tests below.
ARMS = {
    "from-scratch-vit": ["control", "learned", "closer_shift"],
    "from-scratch-lm": ["control", "llama", "llama_fixed", "closer_learned", "closer_shift"],
    "from-scratch-translation": ["control", "normalised"],
}


def shortened(name: str, rates: list[float]) -> dict[str, Any]:
    """All rows, with one of them as --reduced runs it, but smaller and for less long."""
    rows: dict[str, Any] = yaml.safe_load((ROOT / "recipes/configs/measurements.yaml").read_text())
    reduced = rows[name]["reduced"]
    reduced["words"] |= SHORT | OWN[name] | {"config_overrides": ROWS[name]}
    reduced["kinds"] = {"llama": LLAMA}
    reduced["seeds"], reduced["arms"] = [1], ARMS[name]
    words = {"max_steps": 1, **({"other_block_sizes": 8} if name == "from-scratch-lm" else {})}
    reduced["grid"] = {"rates": rates, "words": {**rows[name]["grid"]["words"], **words}}
    return rows


@pytest.mark.parametrize("name", ROWS)
def test_commands_of_a_card_run_and_the_card_says_what_they_wrote(
    measure: Any, shared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rates = [1e-3, 3e-3] if name == "from-scratch-vit" else [1e-3]
    rows = shortened(name, rates)
    monkeypatch.setattr(measure, "yaml", SimpleNamespace(safe_load=lambda text: rows))
    words = ["--checkpoints", str(shared("checkpoints")), "--datasets", str(shared("datasets"))]
    for _ in range(2):  # nothing is run again the second time
        monkeypatch.setattr(sys, "argv", ["measure.py", name, "--reduced", *words, "--outputs", str(tmp_path / "runs")])
        measure.main()

    arms = ARMS[name]
    assert len(measure.commands) == len(arms) * (3 if len(rates) > 1 else 1)
    written = json.loads((tmp_path / f"cards/{name}.json").read_text())
    card = (tmp_path / f"cards/{name}.md").read_text()
    assert list(written["runs"]) == list(written["summary"]) == arms
    assert all(rate in rates for rate in written["learning_rates"].values())
    assert (tmp_path / f"cards/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "This is a reduced budget" in card
    for arm, runs in written["runs"].items():
        (found,) = runs[0]["arms"].values()
        points = found["followed"]
        assert [point["step"] for point in points] == [1.0, 2.0]
        assert all(point.keys() == {"step", "loss", "grad_norm", "attention_norm", "jacobian_norm"} for point in points)
        assert f"| {points[-1]['attention_norm']:.3g} | {points[-1]['jacobian_norm']:.3g} |" in card, arm
        assert f"| {found['stages']['reloaded'][rows[name]['metric']]:.4f} |" in card
    if name == "from-scratch-lm":
        assert [list(own) for own in written["others"].values()] == [["16", "8", "32"]] * len(arms)
        assert "| arm | 8 tokens | 16 tokens, as trained | 32 tokens |" in card
    for folder in (shared("checkpoints"), tmp_path):
        assert str(folder) not in card + json.dumps(written)

    (tmp_path / f"cards/{name}.md").write_text("lost")
    monkeypatch.setattr(sys, "argv", ["measure.py", name, "--card-only"])
    measure.main()
    assert (tmp_path / f"cards/{name}.md").read_text() == card


def test_arms_of_the_cards_train(
    run: Run, checkpoint: Callable[[str], Path], shared: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = yaml.safe_load((ROOT / "recipes/configs/measurements.yaml").read_text())
    arms = {
        arm["words"]["spec"]: None
        for name in ROWS for key, arm in rows[name]["arms"].items() if key not in ARMS[name]
    }  # fmt: skip
    words = f"--from_scratch --model {checkpoint('vit')} --dataset {shared('datasets/cifar10')} --image_column img "
    words += f"--config_overrides {ROWS['from-scratch-vit']} --eval_split test --learnable false --save_strategy no "
    words += "--max_train_examples 8 --max_eval_examples 4 --max_steps 1 --per_device_train_batch_size 4 --spec"
    results = run("image_classification", tmp_path, *words.split(), *arms)
    expected = {"softmax", "poly3", "poly3-none", "poly1", "poly2", "poly5", "taylor3-mean"}
    assert set(results["arms"]) == set(arms) == expected
    assert all(arm["reload_is_equal"] for arm in results["arms"].values())


def test_no_arm_of_a_card_is_told_what_no_run_here_was(measure: Any) -> None:
    rows = yaml.safe_load((ROOT / "recipes/configs/measurements.yaml").read_text())
    grid = importlib.import_module("parts.grid")
    for name in ROWS:
        for reduced in (False, True):
            row = grid.with_budget(rows[name], reduced)
            told = {word for arm in ARMS[name] for word in rows[name]["arms"][arm]["words"]} | set(row["words"])
            assert told >= {word for arm in row["arms"].values() for word in arm["words"]}, name


def test_picture_of_the_norms_has_the_bounds_of_the_theorem(
    measure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plotting = importlib.import_module("parts.plotting")
    figures: list[Any] = []
    monkeypatch.setattr(plotting, "save", lambda figure, path: figures.append(figure))
    point = {"loss": 2.0, "grad_norm": 3.0, "attention_norm": 0.5, "jacobian_norm": 0.25}
    seeds = [[{**point, "step": step, "attention_norm": norm} for step in (1.0, 2.0)] for norm in (0.5, 0.7)]
    nothing = [[{**point, "step": step, "attention_norm": 1e-12, "jacobian_norm": 1e-12} for step in (1.0, 2.0)]]
    plotting.plot_norms({"softmax": seeds, "nothing": nothing}, tmp_path / "norms.png")
    attention, jacobian, gradient = figures[0].axes
    for axes, bound in ((attention, 1.0), (jacobian, 2.0)):
        assert [bound, bound] in [list(line.get_ydata()) for line in axes.lines]
        assert axes.get_ylim()[0] == plotting.LEAST_NORM  # an arm without attention leaves the others room
    assert all(list(line.get_ydata()) == [3.0, 3.0] for line in gradient.lines)
    assert list(attention.lines[0].get_ydata()) == pytest.approx([0.6, 0.6])  # the mean; and the range around it:
    band = attention.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.5, 0.7))


def test_each_arm_gets_the_rate_with_which_it_did_best(measure: Any) -> None:
    grid = importlib.import_module("parts.grid")
    row = {
        "arms": {arm: {"words": {}} for arm in "abc"},
        "grid": {"rates": [1e-3, 3e-3], "words": {"max_steps": 1}},
    }
    measures = {"a@0.001": 2.0, "a@0.003": 1.0, "b@0.001": None, "b@0.003": 5.0, "c@0.001": None, "c@0.003": None}
    assert list(grid.arms_of_grid(row)) == list(measures)
    assert grid.chosen({**row, "higher_is_better": True}, measures) == {"a": 1e-3, "b": 3e-3, "c": 1e-3}
    assert grid.chosen({**row, "higher_is_better": False}, measures) == {"a": 3e-3, "b": 3e-3, "c": 1e-3}
    lower = {**row, "higher_is_better": True, "metric": "bleu"}
    lower["grid"] = {**row["grid"], "metric": "nll", "higher_is_better": False}
    assert grid.chosen(lower, measures) == {"a": 3e-3, "b": 3e-3, "c": 1e-3}
    assert (grid.measure_of(lower), grid.measure_of({**row, "metric": "bleu"})) == ("nll", "bleu")
    assert grid.as_table(row, measures)["b"] == {"0.001": None, "0.003": 5.0}


def test_run_whose_loss_grew_or_is_not_finite_has_diverged(measure: Any) -> None:
    card = importlib.import_module("parts.scratch_card")

    def run(losses: list[float], said: str | None = None) -> dict[str, Any]:
        return {"arms": {"poly3": {"diverged": said, "followed": [{"loss": loss} for loss in losses]}}}

    assert [card.diverged(run([3.0, 2.0])), card.diverged(run([2.0, 3.0]))] == [False, True]
    assert card.diverged(run([3.0, 2.0], "step 9: the loss is nan"))
    assert card.diverged(run([], "step 1: the loss is nan"))


def test_arm_that_diverged_stays_in_the_card(measure: Any) -> None:
    rows = yaml.safe_load((ROOT / "recipes/configs/measurements.yaml").read_text())
    point = {"step": 1.0, "loss": 2.0, "grad_norm": 1.0, "attention_norm": 0.5, "jacobian_norm": 0.25}
    runs = {
        arm: [{"arms": {"x": {"diverged": said, "followed": points}}}]
        for arm, said, points in (("control", None, [point]), ("paper", "nan", []))
    }
    data = {
        "budget": "full", "runs": runs, "others": {}, "grid": {}, "learning_rates": dict.fromkeys(runs, 1e-3),
        "summary": {"control": {"accuracy": measure.summarize([0.5])}, "paper": {}},
    }  # fmt: skip
    text = measure.card("from-scratch-vit", rows["from-scratch-vit"], data)
    assert "| `poly3`, x³/√n | – | – | 0.001 | – | – | 1 of 1 |" in text
    assert "| softmax | 0.5000 |  | 0.001 | 0.5 | 0.25 | 0 of 1 |" in text
    assert "This is the full budget" in text
