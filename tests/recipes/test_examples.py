"""The examples of the recipes' page run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_runs import ROOT, Run, environment, options

README = (ROOT / "recipes/README.md").read_text().replace("\\\n", " ")
COMMANDS = re.findall(r"^(?:accelerate launch|torchrun .*) recipes/(\w+)\.py (.*--output_dir.*)$", README, re.M)
MODELS = {  # stand in, cut to two layers, for those that the README's examples name
    "openai-community/gpt2": "gpt2-tinystories",
    "meta-llama/Llama-3.2-1B": "llama",
    "google/vit-base-patch16-224": "vit",
    "models/gpt2-zinc": "gpt2-zinc",
    "google-bert/bert-base-uncased": "minilm",
    "BAAI/bge-small-en-v1.5": "minilm",
}
DATA = {
    "Salesforce/wikitext": "datasets/tinystories",
    "roneneldan/TinyStories": "datasets/tinystories",
    "stanfordnlp/sst2": "datasets/sst2",
    "uoft-cs/cifar10": "datasets/cifar10",
    "data/zinc": "datasets/zinc",
    "bentrevett/multi30k": "datasets/multi30k",
}
SHORTER = "--max_steps 1 --max_train_examples 16 --max_eval_examples 4 --calibration_batches 1 "
SHORTER += "--per_device_train_batch_size 2 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1"
OWN = {
    "text_classification": "--max_length 16",
    "image_classification": "--image_size 32",
    "causal_lm": "--block_size 64",
    "sentence_embedding": "--max_length 16",
    "translation": "--max_length 12 --num_beams 2 --measure last",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def smaller(words: Iterable[Any], shorter: Any, shared: Any) -> list[Any]:
    small = {name: str(shared(path)) for name, path in DATA.items()}
    small |= {name: str(shorter(short)) for name, short in MODELS.items()}
    return [small.get(str(word), word) for word in words]


def without_config(words: list[str]) -> list[str]:
    start = words.index("--dataset_config") if "--dataset_config" in words else len(words)
    return words[:start] + words[start + 2 :]


@pytest.mark.parametrize(("recipe", "example"), COMMANDS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(COMMANDS)])
def test_example_of_the_readme_runs(
    run: Run, shorter: Any, shared: Any, outputs: Path, recipe: str, example: str
) -> None:
    words = shlex.split(example)
    output = outputs / words[words.index("--output_dir") + 1]
    if words[0].endswith(".yaml"):
        values = yaml.safe_load(Path(ROOT / words[0]).read_text())
        values = dict(zip(values, smaller(values.values(), shorter, shared), strict=True))
        del values["dataset_config"]
        words[0] = str(outputs / "arguments.yaml")
        Path(words[0]).write_text(yaml.safe_dump(values))
    words = without_config(smaller(words, shorter, shared))
    words = [outputs / word if str(word).endswith("/softmax/model") else word for word in words]  # of an example above
    again = "--resume" in words
    results = run(recipe, output, *words, *SHORTER.split(), *OWN[recipe].split())
    assert results["arguments"]["resume"] == again
    for spec, arm in results["arms"].items():
        assert arm["reload_is_equal"]
        assert arm["spent"]["steps"] == 1
        assert (output / spec / "adapter").exists() == (results["arguments"]["lora_rank"] > 0)


def test_readme_has_an_example_of_each_recipe() -> None:
    recipes = {"causal_lm", "text_classification", "image_classification", "sentence_embedding", "translation"}
    assert {recipe for recipe, _ in COMMANDS} == recipes
    assert len(COMMANDS) == 14


def test_line_for_two_processes_starts_two(shorter: Any, shared: Any, tmp_path: Path) -> None:
    (line,) = re.findall(r"^torchrun (.*--use_cpu.*)$", README, re.M)
    words = without_config(smaller(shlex.split(line), shorter, shared))
    words += [*SHORTER.split(), *OWN["causal_lm"].split(), *options(tmp_path), "--spec", "softmax"]
    alone = {name: value for name, value in environment().items() if name != "ACCELERATE_USE_CPU"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *words], cwd=ROOT, env=alone, check=True)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert (results["device"]["type"], results["device"]["processes"]) == ("cpu", 2)
    spent = {"steps": 1, "steps_before": 0, "examples_at_most": 4, "tokens": 4 * 64}  # 2 rows for each process
    assert results["arms"]["softmax"]["spent"] == spent


def test_accelerate_on_cpus_starts_one_process_whatever_it_is_asked_for(tmp_path: Path) -> None:
    (words,) = re.findall(r"^`accelerate (launch --cpu --num_processes 2)` starts one", README, re.M)
    script = tmp_path / "say.py"
    script.write_text("import os; print('started as one of', os.environ.get('WORLD_SIZE', '1'))")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words.split(), str(script)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.count("started as one of 1") == done.stdout.count("started") == 1
