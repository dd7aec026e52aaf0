"""What the recipes make of texts and images."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import Run
from transformers import AutoTokenizer


@pytest.mark.parametrize("streaming", [False, True])
def test_text_classifier_learns_and_reloads(
    run: Run, shorter: Callable[[str], Path], shared: Callable[[str], Path], tmp_path: Path, streaming: bool
) -> None:
    words = f"--model {shorter('minilm')} --dataset {shared('datasets/sst2')} --text_column sentence "
    words += "--max_eval_examples 24 --max_length 16 --spec poly6-l1 --calibration_batches 1 --max_steps 3 "
    words += "--max_train_examples 48 --save_strategy no --learning_rate 1e-4 --metrics no_such_metric "
    results = run("text_classification", tmp_path, *words.split(), *(["--streaming", "--num_labels", "2"] * streaming))
    arm = results["arms"]["poly6-l1"]
    assert set(arm["stages"]["finetuned"]) == {"accuracy", "macro_f1"}  # what cannot be fetched is left out
    assert arm["reload_is_equal"]
    assert arm["spent"]["tokens"] < 3 * 8 * 16  # padding is not counted
    assert results["data"]["labels"] == ["negative", "positive"]


def test_images_of_another_size_and_labels_are_trained_on(
    run: Run, shorter: Callable[[str], Path], shared: Callable[[str], Path], tmp_path: Path
) -> None:
    words = f"--model {shorter('vit')} --dataset {shared('datasets/cifar10')} --image_column img --eval_split test "
    words += "--image_size 48 --max_train_examples 16 --max_eval_examples 9 --spec poly3 --calibration_batches 1 "
    words += "--max_steps 2 --save_strategy no --per_device_train_batch_size 4 --measure last"
    results = run("image_classification", tmp_path, *words.split())
    arm = results["arms"]["poly3"]
    assert list(arm["stages"]) == ["finetuned", "reloaded"]  # before its head is trained no stage says anything
    assert arm["reload_is_equal"]
    assert arm["spent"] == {"steps": 2, "steps_before": 0, "examples_at_most": 8}
    config = json.loads((tmp_path / "poly3/model/config.json").read_text())
    assert len(config["id2label"]) == 10
    processor = json.loads((tmp_path / "poly3/model/preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 48, "width": 48}


def test_mirrored_images_follow_the_generator_that_checkpoints_hold(run: Run) -> None:
    mirror = importlib.import_module("image_classification").mirror
    batch = {"pixel_values": torch.arange(64.0).reshape(16, 1, 1, 4)}
    state = torch.get_rng_state()
    first = mirror(batch)["pixel_values"]
    torch.set_rng_state(state)
    assert torch.equal(mirror(batch)["pixel_values"], first)
    mirrored = (first != batch["pixel_values"]).flatten(1).any(1)
    assert 0 < mirrored.sum() < 16
    assert torch.equal(first[mirrored], batch["pixel_values"][mirrored].flip(-1))


def test_offline_metric_equals_the_definition(run: Run) -> None:
    metric = importlib.import_module("parts.classification").Classification(keep_in_memory=True)
    values = metric.compute(predictions=[0, 0, 1, 2, 2, 2], references=[0, 1, 1, 2, 2, 0])
    assert values["accuracy"] == pytest.approx(4 / 6)
    assert values["macro_f1"] == pytest.approx((2 * 1 / 4 + 2 * 1 / 3 + 2 * 2 / 5) / 3)


def test_packed_blocks_lose_no_token_between_them_and_start_documents(run: Run, checkpoint: Any) -> None:
    recipe = importlib.import_module("causal_lm")
    for name, starts in (("llama", True), ("gpt2-zinc", True)):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
        texts = ["CCO", "", None, "CCN", "CNC"]
        made = recipe.blocks({"text": texts}, tokenizer=tokenizer, column="text", size=4)["input_ids"]
        ids = [list(row) for row in recipe.token_ids(texts, tokenizer, start=starts, end=False)]
        flat = [token for row in ids for token in row]
        assert [token for block in made for token in block] == flat[: len(flat) // 4 * 4]
        assert all(row[0] == tokenizer.bos_token_id for row in ids)
        assert len(ids) == 3
