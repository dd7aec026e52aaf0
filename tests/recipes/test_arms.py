"""The arms of a run: the same stages and budget for each, and what an arm can be told."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipe_runs import Run, losses
from transformers import AutoModelForCausalLM

import hf_polyattn
from hf_polyattn.patching.patched import patched_layers


def test_every_arm_has_all_its_stages_and_the_same_budget(told: tuple[Path, dict[str, Any]]) -> None:
    output, results = told
    arms = results["arms"]
    assert list(arms) == ["softmax", "poly6-l1", "poly3"]
    assert list(arms["softmax"]["stages"]) == ["softmax", "finetuned", "reloaded"]
    assert list(arms["poly3"]["stages"]) == ["softmax", "patched", "calibrated", "finetuned", "reloaded"]
    spent = {"steps": 4, "steps_before": 0, "examples_at_most": 16, "tokens": 4 * 4 * 64}
    assert all(arm["spent"] == spent for arm in arms.values())
    assert all(len(losses(arm)) == 4 for arm in arms.values())
    assert {"model", "data", "arguments", "device", "versions", "wall_seconds"} < set(results)
    assert all((output / spec / "model" / "model.safetensors").exists() for spec in arms)
    assert not list(output.rglob(".partial*"))


def test_calibration_keeps_the_checkpoint_and_bare_monomials_do_not(told: tuple[Path, dict[str, Any]]) -> None:
    stages = {name: values["nll"] for name, values in told[1]["arms"]["poly6-l1"]["stages"].items()}
    assert stages["softmax"] == pytest.approx(1.5, abs=0.3)  # as ../shared/README.md measured it
    assert stages["patched"] > stages["softmax"] + 1
    assert stages["calibrated"] < stages["softmax"] + 0.1


def test_training_changes_the_model_and_saving_does_not(told: tuple[Path, dict[str, Any]]) -> None:
    for arm in told[1]["arms"].values():
        stages = arm["stages"]
        assert arm["reload_is_equal"]
        assert stages["reloaded"] == stages["finetuned"]
        assert stages["finetuned"] != stages.get("calibrated", stages["softmax"])


def test_alignment_and_annealing_are_part_of_the_budget(run: Run, stories: list[str], tmp_path: Path) -> None:
    words = "--spec softmax poly3-l1 poly3 --max_steps 6 --align_steps 3 --layer_steps 2 --anneal poly6-l1 "
    words += "--anneal_steps 2 --per_device_train_batch_size 4"
    results = run("causal_lm", tmp_path / "run", *stories, *words.split())
    spent = {spec: (arm["spent"]["steps_before"], arm["spent"]["steps"]) for spec, arm in results["arms"].items()}
    assert spent == {"softmax": (0, 6), "poly3-l1": (2, 4), "poly3": (5, 1)}
    assert all(arm["reload_is_equal"] for arm in results["arms"].values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/poly3/model")
    assert {str(layer.config.spec) for _, layer in patched_layers(model)} == {"poly3"}


def test_arms_that_are_only_calibrated_take_no_step_of_any_kind(
    run: Run, stories: list[str], told: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    words = "--spec poly3 poly6-l1 --calibrate_only poly3 --max_steps 4 --align_steps 1 --layer_steps 1 --anneal "
    words += "poly3-l1 --anneal_steps 1 --per_device_train_batch_size 4"
    arms = run("causal_lm", tmp_path / "run", *stories, *words.split())["arms"]
    spent = {spec: (arm["spent"]["steps_before"], arm["spent"]["steps"]) for spec, arm in arms.items()}
    assert spent == {"poly3": (0, 0), "poly6-l1": (1, 3)}
    stages = arms["poly3"]["stages"]
    assert stages["finetuned"] == stages["calibrated"] == told[1]["arms"]["poly3"]["stages"]["calibrated"]


def test_dropout_is_that_of_the_run_and_not_saved(run: Run, molecules: list[str], tmp_path: Path) -> None:
    words = ["--spec", "poly3", "--max_steps", "2", "--per_device_train_batch_size", "4", "--seed", "1"]
    arms = {}
    for name, dropout in (("own", []), ("none", ["--dropout", "0"]), ("again", ["--dropout", "0"])):
        arms[name] = losses(run("causal_lm", tmp_path / name, *molecules, *words, *dropout)["arms"]["poly3"])
    assert arms["none"] == arms["again"] != arms["own"]
    config = json.loads((tmp_path / "none/poly3/model/config.json").read_text())
    assert config["attn_pdrop"] == config["resid_pdrop"] == 0.1
    with pytest.raises(SystemExit, match="error: --dropout must be at least 0 and less than 1, got 2"):
        run("causal_lm", tmp_path / "two", *molecules, *words, "--dropout", "2")


def test_arms_can_be_compared_in_the_table(told: tuple[Path, dict[str, Any]], run: Run) -> None:
    results = told[1]
    rows = importlib.import_module("parts.comparison").render(results, {"nll": "", "perplexity": ""}).splitlines()
    difference = (results["arms"][arm]["stages"]["finetuned"]["nll"] for arm in ("poly3", "softmax"))
    expected = f"{next(difference) - next(difference):+.4f}"
    assert [row.split()[-1] for row in rows if row.split()[:2] == ["poly3", "finetuned"]] == [expected]


def test_accumulated_gradients_with_a_teacher_equal_those_of_the_whole_batch(
    run: Run, stories: list[str], tmp_path: Path
) -> None:
    words = [*stories, "--spec", "softmax", "poly3", "--max_steps", "2", "--distill_weight", "0.5"]
    size, parts = "--per_device_train_batch_size", "--gradient_accumulation_steps"
    whole = run("causal_lm", tmp_path / "whole", *words, size, "4")["arms"]
    accumulated = run("causal_lm", tmp_path / "parts", *words, size, "2", parts, "2", "--gradient_checkpointing")[
        "arms"
    ]
    plain = run("causal_lm", tmp_path / "plain", *words, size, "4", "--distill_weight", "0")["arms"]
    # A teacher like the model adds nothing; the divergence of hidden states is a ratio of sums over a batch.
    assert losses(whole["softmax"])[0] == pytest.approx(losses(plain["softmax"])[0], rel=1e-5)
    assert losses(whole["poly3"])[0] > losses(plain["poly3"])[0] + 0.1
    assert losses(accumulated["softmax"])[0] == pytest.approx(losses(whole["softmax"])[0], rel=1e-5)
    assert losses(accumulated["poly3"]) == pytest.approx(losses(whole["poly3"]), rel=0.02)


def test_polynomials_have_their_own_rate_and_no_decay(run: Run, checkpoint: Callable[[str], Path]) -> None:
    arguments, trainer = (importlib.import_module(f"parts.{name}") for name in ("arguments", "trainer"))
    arguments = arguments.FinetuningArguments(model="m", learning_rate=1e-4, weight_decay=0.1, use_cpu=True)
    arguments.coefficient_learning_rate = 2e-3
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    hf_polyattn.patch_model(model, "poly3")
    groups = trainer.PolyAttentionTrainer(model=model, args=arguments).create_optimizer().param_groups
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    polynomial = {settings[id(layer.delta)] for _, layer in patched_layers(model)}
    assert polynomial == {(2e-3, 0.0)}
    assert settings[id(model.get_input_embeddings().weight)] == (1e-4, 0.1)
    assert groups[0]["lr"] == 1e-4  # the rate that is logged
    assert len(settings) == sum(p.requires_grad for p in model.parameters())


def test_no_steps_only_measure_the_calibrated_model(run: Run, molecules: list[str], tmp_path: Path) -> None:
    words = [*molecules, "--max_steps", "0", "--spec"]
    calibrated = run("causal_lm", tmp_path / "calibrated", *words, "poly3")["arms"]["poly3"]
    bare = run("causal_lm", tmp_path / "bare", *words, "poly3", "--adapt", "none")["arms"]["poly3"]
    assert calibrated["stages"]["finetuned"] == calibrated["stages"]["calibrated"]
    assert bare["stages"]["finetuned"] == bare["stages"]["patched"] == calibrated["stages"]["patched"]
    assert bare["stages"]["finetuned"]["nll"] > calibrated["stages"]["finetuned"]["nll"] + 1
    assert bare["calibration"] is None
    assert math.isclose(calibrated["stages"]["softmax"]["nll"], 0.62, abs_tol=0.05)  # ../shared/README.md
