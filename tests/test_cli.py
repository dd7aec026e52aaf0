"""The command line, as a user types it, on real checkpoints and data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

import hf_polyattn as hp
from hf_polyattn import cli
from hf_polyattn.patching.patched import spec_of

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*words)` returns what `polyattn` prints; a failure raises SystemExit with its message."""

    def run(*words: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["polyattn", *map(str, words)])
        with pytest.raises(SystemExit) as stop:  # typer ends a command that succeeds too
            cli.main()
        if stop.value.code not in (0, None):
            raise SystemExit(stop.value.code)
        return capsys.readouterr().out

    return run


def test_model_is_patched_calibrated_changed_and_diagnosed(
    run: Run, checkpoint: Callable[[str], Path], shared: Callable[[str], Path], tmp_path: Path
) -> None:
    data = ["--data", shared("datasets/zinc/train.parquet"), "--batches", 2, "--batch-size", 32]
    printed = run("patch", checkpoint("gpt2-zinc"), tmp_path / "first", "--spec", "poly3^16-l1", *data)
    assert "explained variance" in printed
    assert "transformer.h.3.attn" in printed
    assert re.search(r"every layer fits; the worst head, \d of transformer\.h\.\d\.attn, explains [01]\.\d{4}", printed)
    (agreement,) = re.findall(r"similarity to softmax on the same data: ([01]\.\d+)", printed)
    assert float(agreement) > 0.99
    assert "poly3^16-l1  patched" in run("describe", tmp_path / "first")

    run("calibrate", tmp_path / "first", tmp_path / "second", "--spec", "poly6-l1", *data)
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second").eval()
    assert spec_of(second) == "poly6-l1"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "second")
    molecules = tokenizer(["CC(=O)Nc1ccc(O)cc1", "CN1C=NC2=C1C(=O)N(C(=O)N2C)C"], return_tensors="pt", padding=True)
    tokens = {name: molecules[name] for name in ("input_ids", "attention_mask")}
    assert hp.similarity(second, [tokens]) > 0.99
    hp.patch_model(hp.unpatch_model(second), "poly3")
    assert hp.similarity(second, [tokens]) < 0.9
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["first", "second"]  # nothing partial

    printed = run("diagnose", tmp_path / "second", "--output", tmp_path / "report", *data)
    assert "transformer.h.0.attn" in printed
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == ["diagnosis.json", "diagnosis.png"]
    assert json.loads((tmp_path / "report/diagnosis.json").read_text())["layers"]


def test_polynomials_are_printed_and_written(
    run: Run, checkpoint: Callable[[str], Path], shared: Callable[[str], Path], tmp_path: Path
) -> None:
    data = ["--data", shared("datasets/zinc/train.parquet"), "--batches", 1, "--batch-size", 32]
    run("patch", checkpoint("gpt2-zinc"), tmp_path / "model", "--spec", "poly2^4-l1", *data)
    printed = run("polynomials", tmp_path / "model", "--json", tmp_path / "polynomials.json")
    assert "transformer.h.3.attn" in printed
    written = json.loads((tmp_path / "polynomials.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert written == hp.polynomials(model).to_dict()
    assert [layer["depth"] for layer in written["layers"]] == [6] * 4
    assert len(written["layers"][0]["heads"][0]["in_interval"]) == 3
    with pytest.raises(SystemExit, match=r"polyattn: .* is not patched"):
        run("polynomials", checkpoint("gpt2-zinc"), "--json", tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_floor_chooses_the_cheapest_specs_for_images(
    run: Run,
    checkpoint: Callable[[str], Path],
    shorter: Callable[[str], Path],
    shared: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    words = ["--data", shared("datasets/zinc"), "--split", "test", "--floor", 0.999, "--batches", 4, "--batch-size", 8]
    assert "chosen, layer by layer" in run("patch", checkpoint("gpt2-zinc"), tmp_path / "mixed", *words)
    mixed = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    assert hp.is_patched(mixed)

    images = ["--data", shared("datasets/cifar10/test.parquet"), "--split", "test", "--batches", 1, "--batch-size", 2]
    run("patch", shorter("vit"), tmp_path / "vit", "--spec", "poly3^8-l1", *images)
    assert spec_of(AutoModelForImageClassification.from_pretrained(tmp_path / "vit")) == "poly3^8-l1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("describe ../nowhere", r"polyattn: cannot load '../nowhere'"),
        ("patch {model} {out} --data {data} --spec poly99", r"polyattn: spec 'poly99'.* Grammar"),
        (
            "patch {model} {out} --data ../nowhere.parquet",
            r"polyattn: cannot read split 'train' of '../nowhere.parquet'",
        ),
        ("patch {model} {out} --data {data} --column smiles", r"no column 'smiles'; it has \['text'\]"),
        ("calibrate {model} {out} --data {data}", "polyattn: .* is not patched"),
        ("diagnose {model} --data {data}", "polyattn: .* is not patched"),
        ("push {model} me/model", r"polyattn: .* is a softmax model; `polyattn patch"),
        ("explore ../nowhere", r"polyattn: cannot load '../nowhere'"),
        ("explore {model} --data ../nowhere.parquet", r"polyattn: cannot read split 'train' of '../nowhere.parquet'"),
        ("bench --redraw ../nowhere.json", r"polyattn: \.\./nowhere\.json cannot be drawn, it is no bench\.json"),
        ("bench --device tpu", r"polyattn: device must be one of \['cpu', 'cuda'\], got 'tpu'"),
        ("bench --backend fast", "polyattn: backend 'fast'"),
    ],
    ids=[
        "nowhere",
        "spec",
        "data",
        "column",
        "calibrate-softmax",
        "diagnose-softmax",
        "push-softmax",
        "explore-nowhere",
        "explore-data",
        "redraw",
        "device",
        "backend",
    ],
)
def test_errors_are_one_sentence_and_nothing_is_written(
    run: Run, checkpoint: Callable[[str], Path], shared: Callable[[str], Path], tmp_path: Path, words: str, message: str
) -> None:
    places = {"model": checkpoint("gpt2-zinc"), "data": shared("datasets/zinc/test.parquet"), "out": tmp_path / "out"}
    with pytest.raises(SystemExit, match=message):
        run(*words.format(**places).split())
    assert not list(tmp_path.iterdir())


def test_help_names_every_command_without_loading_models() -> None:
    code = "import sys; sys.argv[1:] = ['--help']\nfrom hf_polyattn.cli import app\ntry: app()\n"
    code += "except SystemExit: print(*{'datasets', 'hf_polyattn.patching', 'hf_polyattn.bench'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *printed, loaded = done.stdout.splitlines()
    assert loaded == ""
    for command in ("describe", "patch", "calibrate", "diagnose", "explore", "push", "bench", "build"):
        assert any(f" {command} " in line for line in printed), command
