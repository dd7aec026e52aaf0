"""What users can put right is said in a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from recipe_runs import Run
from safetensors.torch import load_file
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM


def bad_rows(folder: Path, **columns: list[Any]) -> str:
    file = folder / "rows.parquet"
    Dataset.from_dict(columns).to_parquet(file)
    return str(file)


BAD = {
    "missing-column": ("--text_column story", r"no column 'story'; it has \['text'\]"),
    "missing-split": ("--eval_split tset", "cannot read split 'tset'"),
    "missing-data": ("--dataset ../shared/nowhere.parquet", "cannot read split"),
    "block-longer-than-context": ("--block_size 4096", "--block_size 4096 does not fit the context"),
    "document-longer-than-block": ("--pack false --block_size 16", "set --truncate"),
    "less-than-a-block": ("--max_eval_examples 0", "less than one block"),
    "endless-stream": ("--streaming --max_steps -1", "set --max_steps"),
    "unknown-polynomial": ("--spec poly9", "poly9"),
    "ladder-beyond-the-budget": ("--anneal poly3-l1", "are part of the budget: set --max_steps, now 1, to 100 or more"),
    "ladder-to-a-bare-monomial": ("--adapt none --align_steps 1", "do not go with --adapt none"),
    "ladder-with-adapters": ("--lora_rank 2 --align_steps 1", "do not go with --lora_rank"),
    "bare-and-matched": ("--adapt none --layer_steps 1", "do not go with --adapt none"),
    "unknown-polynomial-to-calibrate": ("--calibrate_only poly9", "poly9"),
    "held-out-split-that-is-trained-on": ("--eval_split train", "the held-out rows would be the training rows"),
    "no-model": ("--model ../shared/nowhere", "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_a_line(run: Run, stories: list[str], tmp_path: Path, name: str) -> None:
    words, message = BAD[name]
    with pytest.raises(SystemExit, match=message) as stop:
        run("causal_lm", tmp_path / "out", *stories, "--spec", "poly3", "--max_steps", "1", *words.split())
    assert str(stop.value).startswith("error: ")
    assert not (tmp_path / "out/all_results.json").exists()


@pytest.mark.parametrize("splits", ["", "--eval_split train", "--train_split train[:50%]"])
def test_file_whose_rows_would_be_both_trained_and_measured_on_is_refused(
    run: Run, stories: list[str], tmp_path: Path, splits: str
) -> None:
    words = [*stories, "--dataset", bad_rows(tmp_path, text=["once upon a time"] * 9), *splits.split()]
    if splits.endswith("]"):
        words += ["--eval_split", "train[:50%]"]
    with pytest.raises(SystemExit, match="the held-out rows would be the training rows; set --eval_dataset"):
        run("causal_lm", tmp_path / "out", *words, "--spec", "poly3", "--max_steps", "1")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        pytest.param({"text": [], "label": []}, "no data", id="empty-split"),
        pytest.param({"text": ["a"], "label": [2]}, "label 2 in column 'label' is out of range", id="label-too-large"),
        pytest.param({"text": ["a"], "label": [-1]}, "label -1 in column", id="negative-label"),
        pytest.param({"text": ["a"], "label": [None]}, "label None in column", id="no-label"),
    ],
)
def test_unusable_labels_are_named(
    run: Run, checkpoint: Any, shared: Any, tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    good = bad_rows(tmp_path, text=["a", "b"], label=[0, 1])
    (tmp_path / "held_out").mkdir()
    bad = bad_rows(tmp_path / "held_out", **columns)
    words = ["--model", checkpoint("minilm"), "--dataset", good, "--eval_dataset", bad, "--max_steps", "1"]
    with pytest.raises(SystemExit, match=message):
        run("text_classification", tmp_path / "out", *words, "--num_labels", "2")


def test_model_that_would_stay_softmax_is_refused(
    run: Run, stories: list[str], checkpoint: Any, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    bloom = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2)
    BloomForCausalLM(bloom).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    with pytest.raises(SystemExit, match=r"error: .*Bloom"):
        run("causal_lm", tmp_path / "out", *stories, "--model", tmp_path / "bloom", "--spec", "poly3")


def test_loss_that_is_not_a_number_names_the_step(run: Run, molecules: list[str], tmp_path: Path) -> None:
    words = [*molecules, "--spec", "poly3", "--max_steps", "6", "--save_steps", "1", "--learning_rate", "1e18"]
    with pytest.raises(SystemExit, match=r"error: step \d: the (loss|norm of the gradient) is (nan|inf)"):
        run("causal_lm", tmp_path, *words, "--warmup_steps", "0", "--lr_scheduler_type", "constant")
    kept = list((tmp_path / "poly3").glob("checkpoint-*"))
    assert kept
    for folder in kept:
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())
