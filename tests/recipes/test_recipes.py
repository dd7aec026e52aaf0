"""The recipes, run as users run them, on a shortened demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer, MPNetConfig, MPNetModel

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipes/sentence_embedding.py"
ACCELERATE = ["accelerate.commands.launch", "--config_file", "recipes/configs/cpu.yaml"]
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2"]
SHORT = ["--max_length", "24", "--batch_size", "16", "--max_sentences", "128", "--held_out", "64", "--steps", "2"]
STAGES = ["softmax", "patched", "calibrated", "finetuned", "reloaded"]
MEASURES = {"cosine", "similarity_correlation", "neighbour_agreement", "latency_ms", "softmax_latency_ms"}


def launch(launcher: list[str], output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, RECIPE, "recipes/configs/quick.yaml", *SHORT]
    return subprocess.run(
        [*command, "--output_dir", str(output), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture(scope="module")
def demo(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and printed text of the shortened demo."""
    checkpoint("minilm")
    output = tmp_path_factory.mktemp("outputs") / "demo"
    return output, launch(ACCELERATE, output).stdout


@pytest.fixture(scope="module")
def results(demo: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((demo[0] / "results.json").read_text())


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import sentence_embedding

    return sentence_embedding


def run_in_process(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [RECIPE, *arguments])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipe.main((recipe.StageArguments, recipe.EncoderArguments), recipe.SentenceEmbedding)


def test_results_hold_every_stage_of_three_polynomials(results: dict[str, Any]) -> None:
    assert list(results["specs"]) == ["poly3", "poly6-l1", "poly3^16-l1"]
    for result in results["specs"].values():
        assert list(result["stages"]) == STAGES
        assert all(set(values) - {"steps"} == MEASURES for values in result["stages"].values())
    steps = [result["stages"]["finetuned"]["steps"] for result in results["specs"].values()]
    assert steps == [2, 2, 0]
    assert [len((result["distillation"] or {"losses": ()})["losses"]) for result in results["specs"].values()] == steps


def test_results_say_how_they_came_about(results: dict[str, Any]) -> None:
    assert {"model", "data", "arguments", "seed", "device", "versions"} < set(results)
    assert results["arguments"]["steps"] == 2  # the command line goes before quick.yaml
    assert results["arguments"]["calibration_batches"] == 4  # quick.yaml goes before the default
    assert results["data"]["train_sentences"] == results["data"]["held_out_sentences"] == 64
    assert results["wall_seconds"] > 0
    assert results["peak_memory_mib"] < 4096


def test_bare_cubic_is_far_from_softmax_and_calibration_brings_it_back(results: dict[str, Any]) -> None:
    cosine = {
        spec: {stage: values["cosine"] for stage, values in result["stages"].items()}
        for spec, result in results["specs"].items()
    }
    assert cosine["poly3"]["softmax"] == pytest.approx(1.0, abs=1e-5)
    assert cosine["poly3"]["patched"] < 0.5
    assert cosine["poly3"]["calibrated"] > 0.95
    assert cosine["poly6-l1"]["calibrated"] > 0.99
    assert cosine["poly3^16-l1"]["calibrated"] > 0.9998


def test_reloaded_checkpoints_equal_the_saved_ones(demo: tuple[Path, str], results: dict[str, Any]) -> None:
    quality = ("cosine", "similarity_correlation", "neighbour_agreement")
    for spec, result in results["specs"].items():
        stages = result["stages"]
        assert result["reload_is_equal"]
        assert [stages["reloaded"][name] for name in quality] == [stages["finetuned"][name] for name in quality]
        assert (demo[0] / spec / "model.safetensors").exists()
    finetuned = results["specs"]["poly3"]["stages"]
    assert finetuned["finetuned"]["cosine"] != finetuned["calibrated"]["cosine"]


def test_another_checkpoint_under_the_same_name_is_noticed(
    demo: tuple[Path, str], recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def save_another(self: Any, model: Any, folder: Path) -> None:
        AutoModel.from_pretrained(demo[0] / "poly6-l1").save_pretrained(folder)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(recipe.SentenceEmbedding, "save", save_another)
    short = [*SHORT, "--specs", "poly3", "--calibrate_only", "poly3", "--latency_repeats", "1"]
    with pytest.raises(RuntimeError, match="something else in a new process"):
        run_in_process(recipe, monkeypatch, *short, "--output_dir", str(tmp_path))


def test_table_and_plot_are_whole(demo: tuple[Path, str]) -> None:
    output, printed = demo
    for words in ("poly3^16-l1", "neighbour_agreement", "no training", "1 is the same", "below 1 is faster"):
        assert words in printed
    assert printed.count("reloaded") == 3 + 1
    assert (output / "stages.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.glob(".partial*"))


def test_two_processes_share_the_work_and_one_writes(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint("minilm")
    printed = launch(TORCHRUN, tmp_path, "--specs", "poly3", "--latency_repeats", "1").stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["device"]["processes"] == 2
    assert list(results["specs"]["poly3"]["stages"]) == STAGES
    assert results["specs"]["poly3"]["reload_is_equal"]
    assert printed.count("reloaded") == 1 + 1


def test_alignment_is_part_of_the_steps(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint("minilm")
    monkeypatch.chdir(ROOT)
    words = [*SHORT, "--specs", "poly3", "--latency_repeats", "1", "--output_dir", str(tmp_path)]
    run_in_process(recipe, monkeypatch, *words, "--steps", "3", "--align_steps", "1", "--layer_steps", "1")
    result = json.loads((tmp_path / "results.json").read_text())["specs"]["poly3"]
    assert result["stages"]["finetuned"]["steps"] == 3
    assert len(result["distillation"]["losses"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param("--steps 5 --align_steps 6", "6 are part of --steps, now 5", id="too-many-to-align"),
        pytest.param("--adapt none --layer_steps 1", "go with calibration", id="bare-and-matched"),
    ],
)
def test_stages_that_do_not_go_together_are_refused(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        run_in_process(recipe, monkeypatch, *words.split())


def test_held_out_sentences_are_never_trained_on(recipe: ModuleType) -> None:
    task = recipe.SentenceEmbedding(recipe.StageArguments(), recipe.EncoderArguments())
    train = {tuple(example["input_ids"]) for example in task.train_loader.dataset}
    held_out = {tuple(example["input_ids"]) for example in task.held_out}
    assert len(held_out) == 300
    assert len(train) > 1000
    assert not train & held_out


def test_documentation_sentences_are_prose(recipe: ModuleType) -> None:
    sentences = recipe.documentation_sentences()
    assert len(sentences) > 1000
    assert "The references are part of a container’s value." in sentences
    assert all(sentence[0].isupper() and sentence[-1] in ".!?" for sentence in sentences)
    assert not any(code in sentence for sentence in sentences for code in (">>>", "::=", "**", "\n"))
    assert len({sentence.casefold() for sentence in sentences}) == len(sentences)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json"])
def test_local_files_are_read(recipe: ModuleType, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"sentences.{suffix}"
    getattr(Dataset.from_dict({"line": ["One.", "Two.", "One.", "", None]}), f"to_{suffix}")(file)
    arguments = recipe.EncoderArguments(dataset=str(file), text_column="line")
    assert recipe.read_sentences(arguments) == ["One.", "Two."]


@pytest.mark.parametrize(
    ("column", "texts", "message"),
    [
        pytest.param("sentence", ["One."], r"no column 'text'.*\['sentence'\]", id="missing-column"),
        pytest.param("text", ["", ""], "has no text in it", id="empty-data-set"),
        pytest.param("text", ["One.", "Two."], "2 different sentences are too few", id="too-few-sentences"),
    ],
)
def test_unusable_data_is_named(
    recipe: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    column: str,
    texts: list[str],
    message: str,
) -> None:
    Dataset.from_dict({column: texts}).to_parquet(tmp_path / "data.parquet")
    arguments = ["--model", str(checkpoint("minilm")), "--dataset", str(tmp_path / "data.parquet")]
    with pytest.raises(SystemExit, match=message):
        run_in_process(recipe, monkeypatch, *arguments)


def test_encoder_that_would_stay_softmax_is_refused(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("minilm"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    MPNetModel(MPNetConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "mpnet")
    tokenizer.save_pretrained(tmp_path / "mpnet")
    with pytest.raises(SystemExit, match="MPNet"):
        run_in_process(recipe, monkeypatch, *SHORT, "--model", str(tmp_path / "mpnet"), "--output_dir", str(tmp_path))
    assert not (tmp_path / "results.json").exists()


def test_unknown_names_in_a_file_of_arguments_are_refused(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "arguments.yaml"
    file.write_text("step: 3\n")
    with pytest.raises(SystemExit):
        run_in_process(recipe, monkeypatch, str(file))
    assert "known names are" in capsys.readouterr().err
