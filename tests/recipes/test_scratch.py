"""Models from scratch: new weights, the same for every arm, from a config that fits the data."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from recipe_runs import ROOT, Run, environment, killed_while_saving, losses, options
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_polyattn import Monitor, PolyAttentionConfig, patch_model
from hf_polyattn.patching.patched import patched_layers

SMALL = "n_embd=32 n_layer=2 n_head=2 n_positions=64 vocab_size=300 initializer_range=0.1"


@pytest.fixture(scope="module")
def stories_of(shared: Callable[[str], Path]) -> str:
    """GPT-2 of a bare model type, so that its tokenizer is trained."""
    words = f"--from_scratch --model gpt2 --config_overrides {SMALL} --dataset {shared('datasets/tinystories')} "
    words += "--block_size 32 --max_train_examples 30 --max_eval_examples 4 --per_device_train_batch_size 4 "
    return words + "--warmup_steps 0 --logging_steps 1 --learning_rate 3e-3"


@pytest.fixture(scope="module")
def pictures(checkpoint: Callable[[str], Path], shared: Callable[[str], Path]) -> str:
    words = f"--from_scratch --model {checkpoint('vit')} --dataset {shared('datasets/cifar10')} --image_column img "
    words += "--config_overrides image_size=32 patch_size=16 hidden_size=24 num_hidden_layers=2 num_attention_heads=2 "
    words += "intermediate_size=24 --eval_split test --max_train_examples 16 --max_eval_examples 9 "
    return words + "--per_device_train_batch_size 4 --save_strategy no --logging_steps 1 --max_steps 2"


def test_every_arm_starts_from_the_same_new_weights_and_trains(run: Run, stories_of: str, tmp_path: Path) -> None:
    words = [*stories_of.split(), "--spec", "softmax", "poly3", "poly4-l1", "--save_strategy", "no", "--norms"]
    before = [*stories_of.split(), "--save_strategy", "no", "--max_steps", "0", "--spec"]
    start = run("causal_lm", tmp_path / "start", *before, "softmax", "poly4-l1")["arms"]
    weights = [load_file(tmp_path / f"start/{spec}/model/model.safetensors") for spec in start]
    assert all(torch.equal(weights[0][name], other[name]) for other in weights[1:] for name in weights[0])
    other = run("causal_lm", tmp_path / "other", *before, "softmax", "--seed", "1")["arms"]
    assert other["softmax"]["stages"]["finetuned"] != start["softmax"]["stages"]["finetuned"]

    results = run("causal_lm", tmp_path / "run", *words, "--max_steps", "6", "--learnable", "false")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/softmax/model")
    assert len(tokenizer) == 300 == AutoConfig.from_pretrained(tmp_path / "run/poly3/model").vocab_size
    assert tokenizer.decode(tokenizer("Grün, once")["input_ids"], skip_special_tokens=True) == "Grün, once"
    for spec, arm in results["arms"].items():
        assert list(arm["stages"]) == ["finetuned", "reloaded"]
        assert arm["reload_is_equal"]
        assert arm["diverged"] is None
        assert arm["calibration"] is None
        assert losses(arm)[-1] < losses(arm)[0] == pytest.approx(math.log(300), abs=0.3)
        norms = {name for name in arm["log_history"][0] if "/attention_norm/" in name}
        assert norms == {f"polyattn/attention_norm/transformer.h.{i}.attn" for i in range(2)}, spec
        assert arm["log_history"][0]["grad_norm"] > 0.0
    for spec, expected in (("poly3", [0, 0, 0, 1]), ("poly4-l1", [0, 0, 0, 0, 1])):
        for _, layer in patched_layers(AutoModelForCausalLM.from_pretrained(tmp_path / f"run/{spec}/model")):
            assert layer.changed_coefficients().tolist() == [expected] * 2  # frozen
            assert not layer.config.interval


def test_learned_coefficients_learn_and_fixed_lengths_are_a_coefficient(
    run: Run, stories_of: str, tmp_path: Path
) -> None:
    words = [*stories_of.split(), "--max_steps", "3", "--save_strategy", "no", "--other_block_sizes", "16", "64"]
    words += ["--initial_coefficients", "0", "0", "0", str(32**-0.5)]
    arm = run("causal_lm", tmp_path, *words, "--spec", "poly3-none")["arms"]["poly3-none"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "poly3-none/model")
    for _, layer in patched_layers(model):
        learned = layer.changed_coefficients()[:, 3].tolist()
        assert learned != [32**-0.5] * 2
        assert learned == pytest.approx([32**-0.5] * 2, rel=0.1)
    assert list(arm["others"]) == ["16", "64"]
    assert len({arm["others"]["16"]["nll"], arm["others"]["64"]["nll"], arm["stages"]["finetuned"]["nll"]}) == 3


def test_arm_killed_and_resumed_ends_with_the_bits_of_an_unbroken_one(
    run: Run, stories_of: str, tmp_path: Path
) -> None:
    words = [*stories_of.split(), "--spec", "softmax", "poly3", "--max_steps", "6", "--save_steps", "2", "--norms"]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    killed_while_saving(broken, words)
    tokenizer = (broken / "tokenizer/tokenizer.json").stat().st_mtime_ns
    resumed, unbroken = run("causal_lm", broken, *words, "--resume"), run("causal_lm", whole, *words)
    assert (broken / "tokenizer/tokenizer.json").stat().st_mtime_ns == tokenizer  # it was not trained again
    for spec, arm in unbroken["arms"].items():
        assert resumed["arms"][spec]["stages"] == arm["stages"]
        ours, theirs = (load_file(folder / spec / "model/model.safetensors") for folder in (broken, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        norms = [
            [{name: entry[name] for name in entry if "norm" in name} for entry in results["arms"][spec]["log_history"]]
            for results in (resumed, unbroken)
        ]
        assert len(norms[0][0]) == 1 + 2 * 2
        assert norms[0] == norms[1]


def test_stopped_arm_crops_and_mirrors_as_an_unbroken_one_would(run: Run, pictures: str, tmp_path: Path) -> None:
    words = [*pictures.split(), "--spec", "poly3", "--crop_padding", "4", "--in_memory", "true", "--max_steps", "6"]
    words += ["--save_strategy", "steps", "--save_steps", "3"]  # 4 steps an epoch
    whole = run("image_classification", tmp_path / "whole", *words)["arms"]["poly3"]
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole/poly3/checkpoint-3", stopped / "poly3/checkpoint-3")
    resumed = run("image_classification", stopped, *words, "--resume")["arms"]["poly3"]
    assert losses(resumed) == losses(whole)
    assert resumed["stages"] == whole["stages"]
    assert losses(run("image_classification", tmp_path / "plain", *words, "--augment", "false")["arms"]["poly3"]) != (
        losses(whole)
    )


def test_row_shift_moves_each_row_by_its_own_scores(run: Run, stories_of: str, tmp_path: Path) -> None:
    words = [*stories_of.split(), "--max_steps", "1", "--save_strategy", "no", "--learnable", "false"]
    query, key, value = torch.randn(3, 1, 2, 32, 16, generator=torch.Generator().manual_seed(0)) / 2
    key = key + 1.0  # what all keys share moves a row's scores, and no weight of softmax
    softmax = (query @ key.transpose(2, 3) / 4).softmax(-1)
    distance = {}
    for shift in ("moments", "none"):
        arm = run("causal_lm", tmp_path / shift, *words, "--spec", "taylor3-mean", "--row_shift", shift)["arms"]
        assert arm["taylor3-mean"]["reload_is_equal"]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / shift / "taylor3-mean/model")
        for _, layer in patched_layers(model):
            assert layer.config.row_shift == shift
            with torch.no_grad():
                _, weights = layer(query, key, value, return_weights=True)
            distance[shift] = float((weights - softmax).abs().max())
    assert distance["moments"] < 0.1 * distance["none"]


def test_two_processes_train_one_tokenizer_and_give_what_one_gives(run: Run, stories_of: str, tmp_path: Path) -> None:
    words = [*stories_of.split(), "--spec", "poly3", "--max_steps", "2", "--save_strategy", "no", "--dropout", "0"]
    one = run("causal_lm", tmp_path / "one", *words)["arms"]["poly3"]
    words[words.index("--per_device_train_batch_size") + 1] = "2"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "recipes/causal_lm.py"]
    subprocess.run([*command, *words, *options(tmp_path / "two")], cwd=ROOT, env=environment(), check=True)
    two = json.loads((tmp_path / "two/all_results.json").read_text())
    assert two["device"]["processes"] == 2
    assert losses(two["arms"]["poly3"]) == pytest.approx(losses(one), rel=1e-4)


def test_arm_that_diverges_is_written_down_and_the_next_one_runs(run: Run, stories_of: str, tmp_path: Path) -> None:
    words = stories_of.replace("0.1", "8.0").replace("3e-3", "1e18").split()
    words += ["--max_steps", "4", "--save_strategy", "no", "--norms", "--lr_scheduler_type", "constant", "--spec"]
    results = run("causal_lm", tmp_path, *words, "poly5-none", "poly8-none")
    for spec, arm in results["arms"].items():
        assert "not finite" in arm["diverged"] or "is nan" in arm["diverged"] or "is inf" in arm["diverged"]
        assert arm["stages"] == {}
        assert not (tmp_path / spec / "model").exists()
    table = importlib.import_module("parts.comparison").render(results, {"nll": "", "perplexity": ""})
    assert "poly5-none diverged: " in table


def test_images_and_texts_are_classified_from_scratch(
    run: Run, pictures: str, shared: Callable[[str], Path], tmp_path: Path
) -> None:
    arms = run("image_classification", tmp_path / "vit", *pictures.split(), "--spec", "softmax", "poly3", "--norms",
               "--crop_padding", "2")["arms"]  # fmt: skip
    assert all(arm["reload_is_equal"] for arm in arms.values())
    config = json.loads((tmp_path / "vit/poly3/model/config.json").read_text())
    assert (len(config["id2label"]), config["hidden_size"], config["image_size"]) == (10, 24, 32)
    words = f"--from_scratch --model bert --dataset {shared('datasets/sst2')} --text_column sentence --spec poly3-mean "
    words += "--config_overrides hidden_size=24 num_hidden_layers=1 num_attention_heads=2 intermediate_size=24 "
    words += (
        "vocab_size=300 --max_train_examples 16 --max_eval_examples 8 --max_length 16 --max_steps 2 --logging_steps 1"
    )
    arm = run("text_classification", tmp_path / "bert", *words.split(), "--save_strategy", "no")["arms"]["poly3-mean"]
    assert arm["reload_is_equal"]
    processor = run("image_classification", tmp_path / "type", *pictures.split(), "--model", "vit", "--spec", "poly1")
    assert processor["arms"]["poly1"]["reload_is_equal"]  # a bare model type has its class's processor


def test_crops_are_parts_of_the_bordered_image(run: Run) -> None:
    augment = importlib.import_module("image_classification").augment
    pixels = torch.arange(1.0, 1.0 + 8 * 3 * 4 * 5).reshape(8, 3, 4, 5)
    cropped = augment({"pixel_values": pixels}, crop_padding=2)["pixel_values"]
    assert cropped.shape == pixels.shape
    bordered = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    starts = set()
    for image, border in zip(cropped, bordered, strict=True):
        both = (border, border.flip(-1))
        found = [
            (top, left) for top in range(5) for left in range(5) for b in both
            if torch.equal(image, b[:, top : top + 4, left : left + 5])
        ]  # fmt: skip
        assert found
        starts.add(found[0])
    assert len(starts) > 1


@pytest.mark.parametrize("spec", ["poly3", "poly2"])
def test_initializer_range_sets_the_norm_that_the_documentation_says(spec: str) -> None:
    """Scores of normed inputs have the standard deviation d r², and x³/√n the norm √15 (d r²)³ of √N."""
    config = AutoConfig.for_model("vit", hidden_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=64,
                                  patch_size=4, intermediate_size=8, initializer_range=0.1)  # fmt: skip
    norms = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = importlib.import_module("transformers").ViTModel(config).train()
        patch_model(model, PolyAttentionConfig(spec, learnable=False))
        with Monitor(model, norms=True) as monitor:
            model(pixel_values=torch.randn(4, 3, 64, 64))
            norms += [value for name, value in monitor.scalars().items() if "attention_norm" in name]
    deviation = 64 * 0.1**2
    expected = math.sqrt(15) * deviation**3 if spec == "poly3" else math.sqrt(3) * deviation**2
    assert sum(norms) / len(norms) == pytest.approx(expected, rel=0.35)


BAD = {
    "vocabulary": ("--tokenizer {gpt2} --config_overrides vocab_size=100", "2048 tokens, more than .* of 100"),
    "no-room-for-bytes": ("--config_overrides vocab_size=200", "no room for all bytes and marks; set 259 or more"),
    "unknown-setting": ("--config_overrides layers=2", "GPT2Config has no 'layers' to override"),
    "setting-of-another-type": ("--config_overrides n_layer=two", "n_layer is a int"),
    "no-setting": ("--config_overrides n_layer", "takes name=value, got 'n_layer'"),
    "heads": ("--config_overrides n_embd=30 n_head=4", "no model can be made of this GPT2Config"),
    "alignment": ("--align_steps 1", "--align_steps needs a softmax checkpoint"),
    "teacher": ("--distill_weight 1", "--distill_weight without --teacher needs a softmax checkpoint"),
    "too-few-coefficients": ("--initial_coefficients 0 1", "poly3 has 4 coefficients, of t\\^0 … t\\^3; got 2"),
    "nothing-to-train": ("--initial_coefficients 1 0 0 0 --learnable false", "without a power of t cannot train"),
    "block": ("--block_size 65", "--block_size 65 does not fit the context"),
    "other-block": ("--other_block_sizes 65", "--block_size 65 does not fit the context"),
    "norms-of-parts": ("--norms --logging_steps 0.5", "set --logging_steps to whole steps"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_trained_from_scratch_is_said_in_a_line(
    run: Run, stories_of: str, checkpoint: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    words, message = BAD[name]
    words = words.format(gpt2=checkpoint("gpt2-tinystories"))
    with pytest.raises(SystemExit, match=message) as stop:
        run("causal_lm", tmp_path / "out", *stories_of.split(), "--spec", "poly3", "--max_steps", "1", *words.split())
    assert str(stop.value).startswith("error: ")
    assert not (tmp_path / "out/all_results.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config_overrides num_channels=1", "the config is of 1 channels, and images have 3"),
        ("--config_overrides patch_size=5", "images of .* pixels have no patches of 5"),
        ("--config_overrides num_labels=7", "num_labels=7 does not fit the data, which have 10 labels"),
    ],
)
def test_config_that_does_not_fit_the_images_is_refused(
    run: Run, pictures: str, tmp_path: Path, words: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run("image_classification", tmp_path / "out", *pictures.split(), *words.split())


def test_overrides_are_refused_where_a_checkpoint_has_its_own(run: Run, stories: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="are for --from_scratch"):
        run("causal_lm", tmp_path, *stories, "--config_overrides", "num_hidden_layers=1")
    for words in ("--initial_coefficients 0 0 0 1", "--row_shift moments"):
        with pytest.raises(SystemExit, match=f"{words.split()[0]} would be calibrated away; set --adapt none"):
            run("causal_lm", tmp_path, *stories, "--spec", "poly3", *words.split())


def test_tokenizer_of_few_texts_has_the_bytes(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    Dataset.from_dict({"text": ["aé " * 40] * 8}).to_parquet(file)
    words = f"--from_scratch --model gpt2 --config_overrides {SMALL} --dataset {file} --train_split train[:4] "
    words += "--eval_split train[4:] --block_size 8 --spec softmax --max_steps 1 --logging_steps 1 --save_strategy no"
    run("causal_lm", tmp_path / "out", *words.split())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    assert 259 < len(tokenizer) < 300  # there is nothing more to merge
    assert AutoConfig.from_pretrained(tmp_path / "out/softmax/model").vocab_size == len(tokenizer)


def test_images_in_memory_are_those_that_are_decoded_each_time(
    run: Run, checkpoint: Callable[[str], Path], shared: Callable[[str], Path], tmp_path: Path
) -> None:
    words = f"--from_scratch --model {checkpoint('vit')} --dataset {shared('datasets/cifar10')} --image_column img "
    words += "--config_overrides image_size=32 patch_size=16 hidden_size=16 num_hidden_layers=1 num_attention_heads=2 "
    words += "intermediate_size=16 --eval_split test --max_train_examples 8 --max_eval_examples 4 --max_steps 2 "
    words += "--per_device_train_batch_size 4 --logging_steps 1 --save_strategy no --spec poly3 --in_memory"
    kept, decoded = (
        run("image_classification", tmp_path / value, *words.split(), value)["arms"]["poly3"]
        for value in ("true", "false")
    )
    assert losses(kept) == losses(decoded)
    assert kept["stages"] == decoded["stages"]
