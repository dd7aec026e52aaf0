"""The conversion of a sentence encoder, run as users run it, on a shortened demo."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from recipe_runs import ROOT, Run, environment, losses, options, recipes_on_path
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, MPNetConfig, MPNetModel

from hf_polyattn import InputError

RECIPE = "recipes/sentence_embedding.py"
QUICK = "recipes/configs/quick.yaml"
ACCELERATE = ["accelerate.commands.launch", "--config_file", "recipes/configs/cpu.yaml"]
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2"]
SHORT = "--max_length 24 --per_device_train_batch_size 16 --max_train_examples 64 --max_eval_examples 64 "
SHORT += "--calibration_batches 4 --latency_repeats 1 --max_steps 2 --logging_steps 1 --save_strategy no"
STAGES = ["softmax", "patched", "calibrated", "finetuned", "reloaded"]
QUALITY = {"cosine", "similarity_correlation", "neighbour_agreement"}


def launch(launcher: list[str], output: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", *launcher, RECIPE, QUICK, *SHORT.split(), *options(output), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and printed text of the shortened demo."""
    checkpoint("minilm")
    output = tmp_path_factory.mktemp("outputs") / "demo"
    return output, launch(ACCELERATE, output)


@pytest.fixture(scope="module")
def results(demo: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((demo[0] / "all_results.json").read_text())


@pytest.fixture(scope="module")
def recipe(recipes: None) -> ModuleType:
    return importlib.import_module("sentence_embedding")


def test_results_hold_every_stage_of_three_polynomials(results: dict[str, Any]) -> None:
    assert list(results["arms"]) == ["poly3", "poly6-l1", "poly3^16-l1"]
    for arm in results["arms"].values():
        assert list(arm["stages"]) == STAGES
        assert all(set(values) == QUALITY | {"latency_ms", "softmax_latency_ms"} for values in arm["stages"].values())
    steps = [arm["spent"]["steps"] for arm in results["arms"].values()]
    assert steps == [2, 2, 0]
    assert [len(losses(arm)) for arm in results["arms"].values()] == steps


def test_results_say_how_they_came_about(results: dict[str, Any]) -> None:
    assert {"model", "data", "arguments", "seed", "device", "versions"} < set(results)
    assert results["arguments"]["max_steps"] == 2  # the command line goes before quick.yaml
    assert results["arguments"]["calibration_batches"] == 4  # quick.yaml goes before the default
    assert results["data"]["train_sentences"] == results["data"]["held_out_sentences"] == 64
    assert results["wall_seconds"] > 0
    assert results["peak_memory_mib"] < 4096
    assert str(ROOT) not in json.dumps(results)


def test_bare_cubic_is_far_from_softmax_and_calibration_brings_it_back(results: dict[str, Any]) -> None:
    cosine = {
        spec: {stage: values["cosine"] for stage, values in arm["stages"].items()}
        for spec, arm in results["arms"].items()
    }
    assert cosine["poly3"]["softmax"] == pytest.approx(1.0, abs=1e-5)
    assert cosine["poly3"]["patched"] < 0.5
    assert cosine["poly3"]["calibrated"] > 0.95
    assert cosine["poly6-l1"]["calibrated"] > 0.99
    assert cosine["poly3^16-l1"]["calibrated"] > 0.9998


def test_rates_are_those_of_the_normalizer(results: dict[str, Any]) -> None:
    arms = results["arms"].items()
    rates = {spec: [e["learning_rate"] for e in arm["log_history"] if "learning_rate" in e] for spec, arm in arms}
    assert {spec: max(own, default=0.0) for spec, own in rates.items()} == {
        "poly3": 1e-4,
        "poly6-l1": 1e-5,
        "poly3^16-l1": 0.0,
    }


def test_saved_checkpoints_are_measured_alike_in_another_process(
    demo: tuple[Path, str], results: dict[str, Any], recipe: ModuleType
) -> None:
    arguments, data = recipe.EncoderArguments(use_cpu=True), recipe.SentenceArguments(max_eval_examples=64)
    data.max_length = 24
    task = recipe.make_task(arguments, data)

    def predict(source: str) -> torch.Tensor:
        model = task.load_model(source, "float32").eval()
        with torch.no_grad():
            batches = DataLoader(task.held_out, batch_size=32, collate_fn=task.collate)
            return torch.cat([task.predict(model(**batch), batch) for batch in batches])

    softmax = predict(arguments.model)
    for spec, arm in results["arms"].items():
        stages = arm["stages"]
        assert arm["reload_is_equal"]
        measured = task.score(predict(str(demo[0] / spec / "model")), expected=softmax)
        assert [measured[name] for name in QUALITY] == [stages["reloaded"][name] for name in QUALITY]
        assert [measured[name] for name in QUALITY] == [stages["finetuned"][name] for name in QUALITY]
    trained = results["arms"]["poly3"]["stages"]
    assert trained["finetuned"]["cosine"] != trained["calibrated"]["cosine"]


def test_another_checkpoint_under_the_same_name_is_noticed(
    demo: tuple[Path, str], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def save_another(self: Any, folder: Path, model: Any, state: Any) -> None:
        AutoModel.from_pretrained(demo[0] / "poly6-l1/model").save_pretrained(folder)

    monkeypatch.setattr(importlib.import_module("parts.finetuning").Arms, "save", save_another)
    with pytest.raises(SystemExit, match="something else than what was saved"):
        run("sentence_embedding", tmp_path, *SHORT.split(), "--spec", "poly3", "--calibrate_only", "poly3")


def test_table_and_plot_are_whole(demo: tuple[Path, str]) -> None:
    output, printed = demo
    for words in ("poly3^16-l1", "neighbour_agreement", "no training", "1 is the same", "below 1 is faster"):
        assert words in printed
    assert printed.count("reloaded") == 3 + 1
    assert (output / "stages.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.rglob(".partial*"))


def test_two_processes_share_the_work_and_one_writes(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint("minilm")
    printed = launch(TORCHRUN, tmp_path, "--spec", "poly3")
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["device"]["processes"] == 2
    assert list(results["arms"]["poly3"]["stages"]) == STAGES
    assert results["arms"]["poly3"]["reload_is_equal"]
    assert results["arms"]["poly3"]["spent"]["examples_at_most"] == 2 * 2 * 16
    assert printed.count("reloaded") == 1 + 1


def test_alignment_is_part_of_the_steps_and_softmax_learns_nothing_from_itself(
    run: Run, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint("minilm")
    words = "--spec softmax poly3 --max_steps 3 --align_steps 1 --layer_steps 1"
    arms = run("sentence_embedding", tmp_path, *SHORT.split(), *words.split())["arms"]
    assert {name: arms["poly3"]["spent"][name] for name in ("steps_before", "steps")} == {"steps_before": 1, "steps": 2}
    assert len(losses(arms["poly3"])) == 2
    assert arms["softmax"]["stages"]["finetuned"]["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert losses(arms["softmax"]) == pytest.approx([0.0] * 3, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param("--max_steps 5 --align_steps 6", "set --max_steps, now 5, to 6", id="too-many-to-align"),
        pytest.param("--adapt none --layer_steps 1", "go with calibration", id="bare-and-matched"),
        pytest.param("--distill_weight 0", "set --distill_weight above 0", id="nothing-to-learn-from"),
        pytest.param("--calibrate_only poly99", "poly99", id="unknown-polynomial"),
    ],
)
def test_what_does_not_go_together_is_refused(
    run: Run, checkpoint: Callable[[str], Path], tmp_path: Path, words: str, message: str
) -> None:
    checkpoint("minilm")
    with pytest.raises(SystemExit, match=message):
        run("sentence_embedding", tmp_path / "out", *words.split())
    assert not (tmp_path / "out").exists()


def test_held_out_sentences_are_never_trained_on(recipe: ModuleType) -> None:
    task = recipe.make_task(recipe.EncoderArguments(use_cpu=True), recipe.SentenceArguments())
    train = {tuple(ids) for ids in task.train["input_ids"]}
    held_out = {tuple(ids) for ids in task.held_out["input_ids"]}
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
    files = {name: tmp_path / f"{name}.{suffix}" for name in ("train", "held_out")}
    getattr(Dataset.from_dict({"line": ["One.", "Two.", "One.", "", None, "A."]}), f"to_{suffix}")(files["train"])
    getattr(Dataset.from_dict({"line": ["A.", "B.", None, "A.", "C."]}), f"to_{suffix}")(files["held_out"])
    data = recipe.SentenceArguments(str(files["train"]), eval_dataset=str(files["held_out"]), text_column="line")
    arguments = recipe.EncoderArguments(use_cpu=True, per_device_train_batch_size=2)
    assert recipe.read_sentences(data, arguments) == (["One.", "Two."], ["A.", "B.", "C."])


@pytest.mark.parametrize(
    ("column", "texts", "message"),
    [
        pytest.param("sentence", ["One."], r"no column 'text'.*\['sentence'\]", id="missing-column"),
        pytest.param("text", ["", ""], "0 different sentences to train on, and 0 held-out", id="empty-data-set"),
        pytest.param("text", ["One.", "Two."], "0 different sentences to train on, and 2 held-out", id="too-few"),
    ],
)
def test_unusable_data_is_named(
    run: Run, checkpoint: Callable[[str], Path], tmp_path: Path, column: str, texts: list[str], message: str
) -> None:
    file = tmp_path / "data.parquet"
    Dataset.from_dict({column: texts}).to_parquet(file)
    words = ["--model", checkpoint("minilm"), "--dataset", file, "--eval_dataset", file]
    with pytest.raises(SystemExit, match=message):
        run("sentence_embedding", tmp_path / "out", *words)


def test_encoder_that_would_stay_softmax_is_refused(
    run: Run, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("minilm"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    MPNetModel(MPNetConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "mpnet")
    tokenizer.save_pretrained(tmp_path / "mpnet")
    with pytest.raises(SystemExit, match="MPNet"):
        run("sentence_embedding", tmp_path / "out", *SHORT.split(), "--model", tmp_path / "mpnet")
    assert not (tmp_path / "out/all_results.json").exists()


def test_unknown_names_in_a_file_of_arguments_are_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "arguments.yaml"
    file.write_text("step: 3\n")
    with pytest.raises(SystemExit):
        run("sentence_embedding", tmp_path / "out", file)
    assert "known names are" in capsys.readouterr().err


def test_redraw_draws_the_stages_of_a_run_and_refuses_anything_else(tmp_path: Path) -> None:
    import sentence_embedding

    copy = tmp_path / "demo.json"
    copy.write_text((ROOT / "benchmarks/demo.json").read_text())
    sentence_embedding.redraw(copy)
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    copy.write_text('{"arms": {"poly3": {}}}')
    with pytest.raises(InputError, match=r"demo\.json cannot be drawn"):
        sentence_embedding.redraw(copy)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["demo.json", "demo.png"]


def test_the_picture_of_a_run_without_times_has_the_quality_alone(results: dict[str, Any], tmp_path: Path) -> None:
    with recipes_on_path():
        draw = importlib.import_module("sentence_embedding").draw
    untimed = json.loads(json.dumps(results))
    for arm in untimed["arms"].values():
        for stage in arm["stages"].values():
            del stage["latency_ms"], stage["softmax_latency_ms"]
    widths = []
    for name, found in (("timed.png", results), ("untimed.png", untimed)):
        draw(found, tmp_path / name)
        widths.append(int.from_bytes((tmp_path / name).read_bytes()[16:20], "big"))  # of the PNG's header
    assert widths[1] < widths[0]
