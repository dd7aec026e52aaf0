"""The examples of the recipes' page run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_runs import ROOT, Run

README = (ROOT / "recipes/README.md").read_text()
COMMANDS = re.findall(r"^(?:accelerate launch|torchrun .*) recipes/(\w+)\.py (.*)$", README.replace("\\\n", " "), re.M)
COMMANDS = [(recipe, words) for recipe, words in COMMANDS if recipe != "sentence_embedding"]
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
