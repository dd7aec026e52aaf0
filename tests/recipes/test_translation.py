"""Translation: trained from scratch and from a checkpoint, searched for with beams and the cache, measured by BLEU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from recipe_runs import Run, losses
from sacrebleu.metrics import BLEU, CHRF
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_polyattn.patching.patched import patched_layers

MARIAN = "d_model=32 encoder_layers=1 decoder_layers=1 encoder_ffn_dim=32 decoder_ffn_dim=32 encoder_attention_heads=2 "
MARIAN += "decoder_attention_heads=2 vocab_size=400 max_position_embeddings=64"


@pytest.fixture(scope="module")
def pairs(shared: Callable[[str], Path]) -> str:
    words = f"--dataset {shared('datasets/multi30k')} --max_train_examples 64 --max_eval_examples 6 --max_length 24 "
    words += "--num_beams 2 --per_device_train_batch_size 8 --per_device_eval_batch_size 3 --logging_steps 1 "
    return words + "--warmup_steps 0 --save_strategy no --label_smoothing_factor 0.1 --learning_rate 3e-3"


@pytest.fixture(scope="module")
def new(run: Run, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A control and a polynomial, from scratch, and their folder."""
    output = tmp_path_factory.mktemp("new") / "run"
    words = (
        f"--from_scratch --model marian --config_overrides {MARIAN} --max_steps 6 --norms {pairs} --spec softmax poly3"
    )
    return output, run("translation", output, *words.split())


def test_translation_is_trained_from_scratch(new: tuple[Path, dict[str, Any]], run: Run) -> None:
    output, results = new
    for arm in results["arms"].values():
        assert arm["reload_is_equal"]
        assert set(arm["stages"]["finetuned"]) == {"bleu", "chrf", "nll"}
        assert losses(arm)[-1] < losses(arm)[0]
    model = AutoModelForSeq2SeqLM.from_pretrained(output / "poly3/model")
    modules = [path for path, _ in patched_layers(model)]
    assert [path for path in modules if "encoder_attn" in path] == ["model.decoder.layers.0.encoder_attn"]
    assert len(modules) == 3
    logged = [name for name in results["arms"]["softmax"]["log_history"][0] if "attention_norm" in name]
    assert len(logged) == 3


def test_beams_with_the_cache_find_what_they_find_without(
    new: tuple[Path, dict[str, Any]], run: Run, shared: Callable[[str], Path]
) -> None:
    recipe = importlib.import_module("translation")
    folder = new[0] / "poly3/model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    texts = ["Two men are outside.", "A dog runs in the snow next to a very long fence."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    found = recipe.translate(model, batch, beams=3, longest=16, padding=tokenizer.pad_token_id)
    assert found.shape == (2, 16)
    without = model.generate(**batch, num_beams=3, max_length=16, min_length=0, early_stopping=True, use_cache=False)
    assert torch.equal(found[:, : without.shape[1]], without)
    alone = recipe.translate(model, tokenizer(texts[:1], return_tensors="pt"), beams=3, longest=16,
                             padding=tokenizer.pad_token_id)  # fmt: skip
    assert torch.equal(alone[0], found[0])  # padding of the source is not seen


def test_measures_are_those_of_sacrebleu(new: tuple[Path, dict[str, Any]], run: Run) -> None:
    recipe = importlib.import_module("translation")
    tokenizer = AutoTokenizer.from_pretrained(new[0] / "poly3/model")
    references = ["Ein Mann schläft in einem Raum.", "Zwei Hunde laufen über eine Wiese."]
    written = ["Ein Mann schläft in einem Raum.", "Zwei Hunde laufen durch eine Wiese."]
    ids = [tokenizer(text)["input_ids"] for text in written]
    rows = torch.zeros(2, 2 + max(map(len, ids)) + 3)  # padding is token 0
    rows[:, :2] = torch.tensor([[6.0, 2.0], [3.0, 4.0]])
    for row, tokens in zip(rows, ids, strict=True):
        row[2 : 2 + len(tokens)] = torch.tensor(tokens)
    found = recipe.score(rows, tokenizer=tokenizer, references=references)
    assert found == {
        "bleu": BLEU().corpus_score(written, [references]).score,
        "chrf": CHRF().corpus_score(written, [references]).score,
        "nll": 1.5,
    }
    assert 30 < found["bleu"] < 100


def test_labels_are_smoothed(new: tuple[Path, dict[str, Any]], run: Run, pairs: str, tmp_path: Path) -> None:
    """The loss of the first step is Trainer's: 0.9 of the reference's, and 0.1 of the mean over the vocabulary."""
    recipe = importlib.import_module("translation")
    words = f"--from_scratch --model {new[0] / 'softmax/model'} {pairs} --spec softmax --max_train_examples 8 "
    run("translation", tmp_path / "start", *words.split(), "--max_steps", "0", "--dropout", "0")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "start/softmax/model")
    tokenizer = AutoTokenizer.from_pretrained(new[0] / "softmax/model")
    data = recipe.PairArguments(dataset=words.split()[words.split().index("--dataset") + 1], max_train_examples=8)
    rows = recipe.encode_rows(recipe.read_pairs(data)[0][:], tokenizer=tokenizer, sides=("en", "de"), max_length=24)
    examples = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    batch = recipe.collate(examples, padding=tokenizer.pad_token_id, start=model.config.decoder_start_token_id)
    with torch.no_grad():
        logged = model(**batch).logits.log_softmax(-1)
    kept = batch["labels"] != recipe.IGNORED
    reference = -logged[kept].gather(1, batch["labels"][kept][:, None]).mean()
    expected = {0.1: 0.9 * reference - 0.1 * logged[kept].mean(), 0.0: reference}
    assert abs(expected[0.1] - expected[0.0]) > 1e-3
    for share, loss in expected.items():
        told = [*words.split(), "--max_steps", "1", "--dropout", "0", "--label_smoothing_factor", share]
        arm = run("translation", tmp_path / str(share), *told)["arms"]["softmax"]
        assert losses(arm)[0] == pytest.approx(float(loss), rel=1e-4)


def test_checkpoint_is_calibrated_and_fine_tuned(
    new: tuple[Path, dict[str, Any]], run: Run, pairs: str, tmp_path: Path
) -> None:
    words = f"--model {new[0] / 'softmax/model'} {pairs} --spec poly6-l1 --max_steps 2 --calibration_batches 4"
    arm = run("translation", tmp_path, *words.split())["arms"]["poly6-l1"]
    assert list(arm["stages"]) == ["softmax", "patched", "calibrated", "finetuned", "reloaded"]
    nll = {stage: values["nll"] for stage, values in arm["stages"].items()}
    assert nll["softmax"] == new[1]["arms"]["softmax"]["stages"]["reloaded"]["nll"]
    assert abs(nll["calibrated"] - nll["softmax"]) < abs(nll["patched"] - nll["softmax"])
    assert arm["reload_is_equal"]  # Marian's sinusoids, which are not saved, were not trained


def test_bart_translates_and_cross_attention_can_stay_softmax(run: Run, pairs: str, tmp_path: Path) -> None:
    words = f"--from_scratch --model bart --config_overrides {MARIAN} --max_steps 1 {pairs} --spec poly3-mean "
    arm = run("translation", tmp_path, *words.split(), "--cross_attention", "false")["arms"]["poly3-mean"]
    assert arm["reload_is_equal"]
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "poly3-mean/model")
    assert not any("encoder_attn" in path for path, _ in patched_layers(model))


def rows(file: Path, **columns: list[Any]) -> str:
    Dataset.from_dict(columns).to_parquet(file)
    return str(file)


GOOD = {"en": ["a man", "a dog"] * 4, "de": ["ein Mann", "ein Hund"] * 4}


def test_sides_may_lie_in_two_files_of_lines_and_in_nested_columns(run: Run, tmp_path: Path) -> None:
    recipe = importlib.import_module("translation")
    files = {}
    for split, count in (("", 8), ("eval_", 2)):
        for name, side in (("dataset", "en"), ("target_dataset", "de")):
            files[name.replace("dataset", f"{split}dataset")] = file = tmp_path / f"{split}{side}.txt"
            file.write_text("\n".join(GOOD[side][:count]) + "\n")
    lines = {name: str(file) for name, file in files.items()}
    lines = recipe.PairArguments(source_column="text", target_column="text", **lines)
    pairs = [{"en": source, "de": target} for source, target in zip(*GOOD.values(), strict=True)]
    nested = recipe.PairArguments(
        dataset=rows(tmp_path / "nested.parquet", translation=pairs),
        eval_dataset=rows(tmp_path / "held.parquet", translation=pairs[:2]),
        source_column="translation.en",
        target_column="translation.de",
    )
    for data in (lines, nested):
        train, held_out = recipe.read_pairs(data)
        for found, count in ((train, 8), (held_out, 2)):
            assert found[data.source_column][:] == GOOD["en"][:count]
            assert found[data.target_column][:] == GOOD["de"][:count]


@pytest.mark.parametrize(
    ("columns", "words", "message"),
    [
        pytest.param({"en": ["a", " "], "de": ["b", "c"]}, "", "row 1 has an empty 'en'", id="empty-source"),
        pytest.param({"en": ["a", "b"], "de": ["c", None]}, "", "row 1 has an empty 'de'", id="no-target"),
        pytest.param({"en": ["a"], "de": [["b", "c"]]}, "", "row 0 has a list in 'de'", id="not-a-text"),
        pytest.param(GOOD, "--max_length 65", "--max_length 65 does not fit the context", id="too-long"),
        pytest.param(GOOD, "--num_beams 0", "--num_beams must be 1 or more, got 0", id="no-beams"),
        pytest.param(GOOD, "--target_column fr", "has no column 'fr'", id="no-column"),
        pytest.param(GOOD, "--model gpt2 --config_overrides n_layer=1", "without encoder and decoder", id="decoder"),
        pytest.param(GOOD, "--target_eval_dataset x.txt", "set both", id="half-a-file"),
        pytest.param(GOOD, "--target_dataset {one} --target_eval_dataset {one}", "8 sentences and 1 translations",
                     id="unequal"),
    ],
)  # fmt: skip
def test_pairs_that_are_none_are_named_in_a_line(
    run: Run, tmp_path: Path, columns: dict[str, list[Any]], words: str, message: str
) -> None:
    one = rows(tmp_path / "one.parquet", de=["ein Mann"])
    file = rows(tmp_path / "train.parquet", **columns)
    given = f"--from_scratch --model marian --config_overrides {MARIAN} --spec softmax --max_steps 1 --max_length 12 "
    given += f"--dataset {file} --eval_dataset {rows(tmp_path / 'held.parquet', **GOOD)} {words.format(one=one)}"
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run("translation", tmp_path / "out", *given.split())
    assert not (tmp_path / "out/all_results.json").exists()


def test_t5_is_refused_for_its_position_bias(run: Run, tmp_path: Path) -> None:
    words = "--from_scratch --model t5 --config_overrides d_model=16 d_kv=8 num_layers=1 num_heads=2 vocab_size=300 "
    words += f"--dataset {rows(tmp_path / 'a.parquet', **GOOD)} --eval_dataset {rows(tmp_path / 'b.parquet', **GOOD)} "
    with pytest.raises(SystemExit, match="position_bias"):
        run(
            "translation", tmp_path / "out", *words.split(), "--spec", "poly3", "--max_steps", "1", "--max_length", "12"
        )
