"""A run that was stopped goes on with the bits of an unbroken one; what it had saved is whole."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import Run, killed_while_saving, losses
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_polyattn.patching.patched import patched_layers


def test_run_killed_while_saving_and_resumed_ends_like_an_unbroken_one(
    run: Run, molecules: list[str], tmp_path: Path
) -> None:
    words = [*molecules, "--spec", "softmax", "poly3", "--max_steps", "10", "--save_steps", "2"]  # 8 steps an epoch
    words += ["--save_total_limit", "1"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    killed_while_saving(broken, words)
    assert (broken / "poly3/.partial-checkpoint-4/checkpoint-4").exists()
    assert [path.name for path in (broken / "poly3").glob("checkpoint-*")] == ["checkpoint-2"]
    finished = (broken / "softmax/results.json").stat().st_mtime_ns

    resumed, unbroken = run("causal_lm", broken, *words, "--resume"), run("causal_lm", whole, *words)
    assert (broken / "softmax/results.json").stat().st_mtime_ns == finished  # it was not run again
    for spec, arm in unbroken["arms"].items():
        assert resumed["arms"][spec]["stages"] == arm["stages"]
        assert losses(resumed["arms"][spec]) == losses(arm)
        assert resumed["arms"][spec]["spent"] == arm["spent"]
        ours, theirs = (load_file(folder / spec / "model/model.safetensors") for folder in (broken, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(set(losses(unbroken["arms"]["poly3"]))) == 10
    assert [path.name for path in (broken / "poly3").glob("checkpoint-*")] == ["checkpoint-10"]


def test_stream_goes_on_at_the_row_where_it_stopped(run: Run, molecules: list[str], tmp_path: Path) -> None:
    words = [*molecules, "--spec", "softmax", "--streaming", "--max_steps", "6", "--save_steps", "2"]
    whole = run("causal_lm", tmp_path / "whole", *words)["arms"]["softmax"]
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole/softmax/checkpoint-4", stopped / "softmax/checkpoint-4")
    resumed = run("causal_lm", stopped, *words, "--resume")["arms"]["softmax"]
    assert resumed["stages"] == whole["stages"]
    assert losses(resumed) == losses(whole)


def test_run_killed_after_its_last_step_is_not_trained_further(run: Run, molecules: list[str], tmp_path: Path) -> None:
    words = [*molecules, "--spec", "poly3", "--max_steps", "10", "--save_steps", "5"]
    words += ["--lr_scheduler_type", "constant"]
    whole = run("causal_lm", tmp_path, *words)["arms"]["poly3"]
    (tmp_path / "poly3/results.json").unlink()
    resumed = run("causal_lm", tmp_path, *words, "--resume")["arms"]["poly3"]
    assert resumed["stages"] == whole["stages"]
    assert resumed["spent"] == whole["spent"]
    assert losses(resumed) == losses(whole)


def test_adapters_and_polynomials_are_trained_saved_merged_and_reloaded(
    run: Run, molecules: list[str], checkpoint: Callable[[str], Path], batch: Callable[..., Any], tmp_path: Path
) -> None:
    from peft import PeftModel

    words = [*molecules, "--spec", "poly3", "--max_steps", "4", "--lora_rank", "4", "--learning_rate", "1e-2"]
    words += ["--save_steps", "2"]
    results = run("causal_lm", tmp_path, *words)["arms"]["poly3"]
    assert results["reload_is_equal"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "poly3/model").eval()
    config = AutoConfig.from_pretrained(tmp_path / "poly3/adapter")
    base = AutoModelForCausalLM.from_pretrained(checkpoint("gpt2-zinc"), config=config).eval()
    inputs = batch("gpt2-zinc")
    with torch.no_grad():
        before = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "poly3/adapter").eval()
        assert torch.allclose(adapted(**inputs).logits, merged(**inputs).logits, atol=1e-3)
        assert not torch.allclose(before, merged(**inputs).logits, atol=1e-1)
    saved = dict(patched_layers(merged))
    for path, layer in patched_layers(adapted):
        assert torch.equal(layer.changed_coefficients(), saved[path].changed_coefficients())
        assert layer.delta.any()
        assert layer.coefficients[:, :-1].any()  # calibrated, and no longer a bare cubic
    softmax = load_file(checkpoint("gpt2-zinc") / "model.safetensors")
    embeddings = merged.get_input_embeddings().weight
    assert torch.equal(embeddings, softmax["transformer.wte.weight"])  # nothing but adapters and polynomials trains

    (tmp_path / "poly3/results.json").unlink()
    shutil.rmtree(tmp_path / "poly3/checkpoint-4")
    resumed = run("causal_lm", tmp_path, *words, "--resume")["arms"]["poly3"]
    assert resumed["stages"] == results["stages"]
    assert losses(resumed) == losses(results)


def test_full_disk_leaves_the_checkpoints_before_it(
    run: Run, molecules: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a device on which every write finds the disk full")
    kind = importlib.import_module("parts.trainer").PolyAttentionTrainer
    save_optimizer = kind._save_optimizer_and_scheduler

    def save_to_a_full_disk(self: Any, folder: str) -> None:
        if self.state.global_step == 2:
            (Path(folder) / "optimizer.pt").symlink_to("/dev/full")
        save_optimizer(self, folder)

    monkeypatch.setattr(kind, "_save_optimizer_and_scheduler", save_to_a_full_disk)
    words = [*molecules, "--spec", "softmax", "--max_steps", "3", "--save_steps", "1"]
    with pytest.raises(SystemExit, match=r"error: .*checkpoint-2 cannot be written.*is kept"):
        run("causal_lm", tmp_path, *words)
    assert [path.name for path in (tmp_path / "softmax").iterdir()] == ["checkpoint-1"]
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="go on with --resume"):
        run("causal_lm", tmp_path, *words)
    with pytest.raises(SystemExit, match="seed was 42, is 1"):
        run("causal_lm", tmp_path, *words, "--resume", "--seed", "1")
    assert run("causal_lm", tmp_path, *words, "--resume")["arms"]["softmax"]["spent"]["steps"] == 3
