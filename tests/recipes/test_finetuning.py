"""The fine-tuning recipes, run as users run them: on real checkpoints and data, a few steps each."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from hf_polyattn.patching.patched import patched_layers

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "recipes/README.md").read_text()
COMMANDS = re.findall(r"^(?:accelerate launch|torchrun .*) recipes/(\w+)\.py (.*)$", README.replace("\\\n", " "), re.M)
COMMANDS = [(recipe, words) for recipe, words in COMMANDS if recipe != "sentence_embedding"]
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run() -> Run:
    """`run(recipe, output, *words)` runs a recipe in this process and returns its all_results.json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        patch.setenv("ACCELERATE_USE_CPU", "true")

        def run(recipe: str, output: Path, *words: Any) -> dict[str, Any]:
            module = importlib.import_module(recipe)
            patch.setattr(sys, "argv", [f"recipes/{recipe}.py", *map(str, words), *options(output)])
            AcceleratorState._reset_state(reset_partial_state=True)  # a new process would have none
            with contextlib.redirect_stdout(sys.stderr), module.errors_in_a_line():
                module.main()
            return json.loads((output / "all_results.json").read_text())

        yield run


def options(output: Path) -> list[str]:
    return ["--output_dir", str(output), "--disable_tqdm", "true", "--report_to", "none"]


@pytest.fixture(scope="module")
def stories(checkpoint: Callable[[str], Path], shared: Callable[[str], Path]) -> list[str]:
    """Llama, which has no dropout, on packed stories; 7 blocks to measure on."""
    words = f"--model {checkpoint('llama')} --dataset {shared('datasets/tinystories')} --block_size 64 "
    words += "--max_train_examples 40 --max_eval_examples 2 --calibration_batches 2 --learning_rate 3e-4 "
    return (words + "--warmup_steps 0 --logging_steps 1 --save_strategy no").split()


@pytest.fixture(scope="module")
def molecules(checkpoint: Callable[[str], Path], shared: Callable[[str], Path]) -> list[str]:
    """GPT-2, which has dropout, on molecules, one an example."""
    words = f"--model {checkpoint('gpt2-zinc')} --dataset {shared('datasets/zinc')} --eval_split test --pack false "
    words += "--max_train_examples 64 --max_eval_examples 30 --calibration_batches 2 --logging_steps 1 "
    return (words + "--per_device_train_batch_size 8").split()


@pytest.fixture(scope="module")
def told(run: Run, stories: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Output folder and results of a control and two polynomials, in one process."""
    output = tmp_path_factory.mktemp("told") / "run"
    words = [*stories, "--spec", "softmax", "poly6-l1", "poly3", "--max_steps", "4", "--per_device_train_batch_size"]
    return output, run("causal_lm", output, *words, "4")


def losses(arm: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in arm["log_history"] if "loss" in entry]


def environment() -> dict[str, str]:
    """Of another process: it sums in the same order as this one."""
    threads = str(torch.get_num_threads())
    return {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": threads, "ACCELERATE_USE_CPU": "true"}


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


def test_two_processes_give_what_one_gives(
    told: tuple[Path, dict[str, Any]], stories: list[str], tmp_path: Path
) -> None:
    words = [*stories, "--spec", "poly3", "--max_steps", "4", "--per_device_train_batch_size", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "recipes/causal_lm.py"]
    subprocess.run([*command, *words, *options(tmp_path)], cwd=ROOT, env=environment(), check=True)
    results = json.loads((tmp_path / "all_results.json").read_text())
    two, one = results["arms"]["poly3"], told[1]["arms"]["poly3"]
    assert results["device"]["processes"] == 2
    assert two["spent"] == one["spent"]
    assert two["reload_is_equal"]
    for stage, values in one["stages"].items():
        assert two["stages"][stage]["nll"] == pytest.approx(values["nll"], rel=1e-4), stage
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert losses(two)[3] != pytest.approx(losses(two)[0], rel=1e-3)  # batches and steps do differ by more
    ours, theirs = (load_file(folder / "poly3/model/model.safetensors") for folder in (tmp_path, told[0]))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


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


KILLED_WHILE_SAVING = """
import os, runpy, signal, sys
import torch
sys.path.insert(0, "recipes")
save = torch.save
def save_or_die(value, file, *args, **kwargs):
    save(value, file, *args, **kwargs)
    if "poly3/.partial-checkpoint-4/checkpoint-4" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_or_die
runpy.run_path("recipes/causal_lm.py", run_name="__main__")
"""


def test_run_killed_while_saving_and_resumed_ends_like_an_unbroken_one(
    run: Run, molecules: list[str], tmp_path: Path
) -> None:
    words = [*molecules, "--spec", "softmax", "poly3", "--max_steps", "10", "--save_steps", "2"]  # 8 steps an epoch
    words += ["--save_total_limit", "1"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, *words, *options(broken)]
    killed = subprocess.run(command, cwd=ROOT, env=environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
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
        assert torch.equal(layer.coefficients, saved[path].coefficients)
        assert layer.coefficients[:, :-1].any()  # calibrated, and no longer a bare cubic
    softmax = load_file(checkpoint("gpt2-zinc") / "model.safetensors")
    embeddings = merged.get_input_embeddings().weight
    assert torch.equal(embeddings, softmax["transformer.wte.weight"])  # nothing but adapters and polynomials trains

    (tmp_path / "poly3/results.json").unlink()
    shutil.rmtree(tmp_path / "poly3/checkpoint-4")
    resumed = run("causal_lm", tmp_path, *words, "--resume")["arms"]["poly3"]
    assert resumed["stages"] == results["stages"]
    assert losses(resumed) == losses(results)


def test_polynomials_have_their_own_rate_and_no_decay(run: Run, checkpoint: Callable[[str], Path]) -> None:
    import hf_polyattn

    arguments, trainer = (importlib.import_module(f"parts.{name}") for name in ("arguments", "trainer"))
    arguments = arguments.FinetuningArguments(model="m", learning_rate=1e-4, weight_decay=0.1, use_cpu=True)
    arguments.coefficient_learning_rate = 2e-3
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    hf_polyattn.patch_model(model, "poly3")
    groups = trainer.PolyAttentionTrainer(model=model, args=arguments).create_optimizer().param_groups
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    polynomial = {settings[id(layer.coefficients)] for _, layer in patched_layers(model)}
    assert polynomial == {(2e-3, 0.0)}
    assert settings[id(model.get_input_embeddings().weight)] == (1e-4, 0.1)
    assert groups[0]["lr"] == 1e-4  # the rate that is logged
    assert len(settings) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("streaming", [False, True])
def test_text_classifier_learns_and_reloads(
    run: Run, checkpoint: Callable[[str], Path], shared: Callable[[str], Path], tmp_path: Path, streaming: bool
) -> None:
    words = f"--model {checkpoint('minilm')} --dataset {shared('datasets/sst2')} --text_column sentence "
    words += "--max_eval_examples 24 --max_length 16 --spec poly6-l1 --calibration_batches 1 --max_steps 3 "
    words += "--max_train_examples 48 --save_strategy no --learning_rate 1e-4 --metrics no_such_metric "
    results = run("text_classification", tmp_path, *words.split(), *(["--streaming", "--num_labels", "2"] * streaming))
    arm = results["arms"]["poly6-l1"]
    assert set(arm["stages"]["finetuned"]) == {"accuracy", "macro_f1"}  # what cannot be fetched is left out
    assert arm["reload_is_equal"]
    assert arm["spent"]["tokens"] < 3 * 8 * 16  # padding is not counted
    assert results["data"]["labels"] == ["negative", "positive"]


def test_images_of_another_size_and_labels_are_trained_on(
    run: Run, checkpoint: Callable[[str], Path], shared: Callable[[str], Path], tmp_path: Path
) -> None:
    words = f"--model {checkpoint('vit')} --dataset {shared('datasets/cifar10')} --image_column img --eval_split test "
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
    "no-model": ("--model ../shared/nowhere", "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_a_line(run: Run, stories: list[str], tmp_path: Path, name: str) -> None:
    words, message = BAD[name]
    with pytest.raises(SystemExit, match=message) as stop:
        run("causal_lm", tmp_path / "out", *stories, "--spec", "poly3", "--max_steps", "1", *words.split())
    assert str(stop.value).startswith("error: ")
    assert not (tmp_path / "out/all_results.json").exists()


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
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with pytest.raises(SystemExit, match="go on with --resume"):
        run("causal_lm", tmp_path, *words)
    with pytest.raises(SystemExit, match="seed was 42, is 1"):
        run("causal_lm", tmp_path, *words, "--resume", "--seed", "1")
    assert run("causal_lm", tmp_path, *words, "--resume")["arms"]["softmax"]["spent"]["steps"] == 3


def test_loss_that_is_not_a_number_names_the_step(run: Run, molecules: list[str], tmp_path: Path) -> None:
    words = [*molecules, "--spec", "poly3", "--max_steps", "6", "--save_steps", "1", "--learning_rate", "1e18"]
    with pytest.raises(SystemExit, match=r"error: step \d: the (loss|norm of the gradient) is (nan|inf)"):
        run("causal_lm", tmp_path, *words, "--warmup_steps", "0", "--lr_scheduler_type", "constant")
    kept = list((tmp_path / "poly3").glob("checkpoint-*"))
    assert kept
    for folder in kept:
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_no_steps_only_measure_the_calibrated_model(run: Run, molecules: list[str], tmp_path: Path) -> None:
    words = [*molecules, "--max_steps", "0", "--spec"]
    calibrated = run("causal_lm", tmp_path / "calibrated", *words, "poly3")["arms"]["poly3"]
    bare = run("causal_lm", tmp_path / "bare", *words, "poly3", "--adapt", "none")["arms"]["poly3"]
    assert calibrated["stages"]["finetuned"] == calibrated["stages"]["calibrated"]
    assert bare["stages"]["finetuned"] == bare["stages"]["patched"] == calibrated["stages"]["patched"]
    assert bare["stages"]["finetuned"]["nll"] > calibrated["stages"]["finetuned"]["nll"] + 1
    assert bare["calibration"] is None
    assert math.isclose(calibrated["stages"]["softmax"]["nll"], 0.62, abs_tol=0.05)  # ../shared/README.md


SMALLER = {  # stands in for what the README's examples name
    "openai-community/gpt2": "checkpoints/gpt2-tinystories-3m",
    "meta-llama/Llama-3.2-1B": "checkpoints/llama-stories260K",
    "google/vit-base-patch16-224": "checkpoints/vit-tiny-patch16-224",
    "models/gpt2-zinc": "checkpoints/gpt2-zinc-0.5m",
    "Salesforce/wikitext": "datasets/tinystories",
    "roneneldan/TinyStories": "datasets/tinystories",
    "stanfordnlp/sst2": "datasets/sst2",
    "uoft-cs/cifar10": "datasets/cifar10",
    "data/zinc": "datasets/zinc",
}
SHORTER = "--max_steps 1 --max_train_examples 16 --max_eval_examples 4 --calibration_batches 1 "
SHORTER += "--per_device_train_batch_size 2 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1"
OWN = {
    "text_classification": "--max_length 16",
    "image_classification": "--image_size 32",
    "causal_lm": "--block_size 64",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize(("recipe", "example"), COMMANDS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(COMMANDS)])
def test_example_of_the_readme_runs(
    run: Run, checkpoint: Any, shared: Any, outputs: Path, recipe: str, example: str
) -> None:
    words = shlex.split(example)
    output = outputs / words[words.index("--output_dir") + 1]
    small = {name: str(shared(path)) for name, path in SMALLER.items()}
    small["google-bert/bert-base-uncased"] = str(checkpoint("minilm"))
    if words[0].endswith(".yaml"):
        values = {
            name: small.get(str(value), value)
            for name, value in yaml.safe_load(Path(ROOT / words[0]).read_text()).items()
        }
        del values["dataset_config"]
        words[0] = str(outputs / "arguments.yaml")
        Path(words[0]).write_text(yaml.safe_dump(values))
    if "--dataset_config" in words:
        start = words.index("--dataset_config")
        del words[start : start + 2]
    again = "--resume" in words
    results = run(recipe, output, *[small.get(word, word) for word in words], *SHORTER.split(), *OWN[recipe].split())
    assert results["arguments"]["resume"] == again
    for spec, arm in results["arms"].items():
        assert arm["reload_is_equal"]
        assert arm["spent"]["steps"] == 1
        assert (output / spec / "adapter").exists() == (results["arguments"]["lora_rank"] > 0)


def test_readme_has_an_example_of_each_recipe() -> None:
    assert {recipe for recipe, _ in COMMANDS} == {"causal_lm", "text_classification", "image_classification"}
    assert len(COMMANDS) == 9


@pytest.mark.parametrize("name", ["cpu", "one_gpu", "multi_gpu", "fsdp2", "deepspeed_zero3"])
def test_accelerate_understands_its_configurations(name: str) -> None:
    file = ROOT / "recipes/configs" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert (
        config.to_dict().items()
        >= {k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "use_cpu"}.items()
    )
