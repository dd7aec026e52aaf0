"""The fine-tuning recipes, run as users run them: on real checkpoints and data, a few steps each."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from recipe_runs import ROOT, Run, options, recipes_on_path


@pytest.fixture(scope="module", autouse=True)
def recipes() -> Iterator[None]:
    with recipes_on_path():
        yield


@pytest.fixture(scope="session")
def run() -> Run:
    """`run(recipe, output, *words)` runs a recipe in this process and returns its all_results.json."""

    def run(recipe: str, output: Path, *words: Any) -> dict[str, Any]:
        with recipes_on_path() as patch:
            module = importlib.import_module(recipe)
            patch.setattr(sys, "argv", [f"recipes/{recipe}.py", *map(str, words), *options(output)])
            AcceleratorState._reset_state(reset_partial_state=True)  # a new process would have none
            with contextlib.redirect_stdout(sys.stderr), module.errors_in_a_line():
                module.main()
        return json.loads((output / "all_results.json").read_text())

    return run


@pytest.fixture(scope="session")
def stories(checkpoint: Callable[[str], Path], shared: Callable[[str], Path]) -> list[str]:
    """Llama, which has no dropout, on packed stories; 7 blocks to measure on."""
    words = f"--model {checkpoint('llama')} --dataset {shared('datasets/tinystories')} --block_size 64 "
    words += "--max_train_examples 40 --max_eval_examples 2 --calibration_batches 2 --learning_rate 3e-4 "
    return (words + "--warmup_steps 0 --logging_steps 1 --save_strategy no").split()


@pytest.fixture(scope="session")
def molecules(checkpoint: Callable[[str], Path], shared: Callable[[str], Path]) -> list[str]:
    """GPT-2, which has dropout, on molecules, one an example."""
    words = f"--model {checkpoint('gpt2-zinc')} --dataset {shared('datasets/zinc')} --eval_split test --pack false "
    words += "--max_train_examples 64 --max_eval_examples 30 --calibration_batches 2 --logging_steps 1 "
    return (words + "--per_device_train_batch_size 8").split()


@pytest.fixture(scope="session")
def told(run: Run, stories: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Output folder and results of a control and two polynomials, in one process."""
    output = tmp_path_factory.mktemp("told") / "run"
    words = [*stories, "--spec", "softmax", "poly6-l1", "poly3", "--max_steps", "4", "--per_device_train_batch_size"]
    return output, run("causal_lm", output, *words, "4")


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`recipes/measure.py`, whose recipes run in this process and whose cards go to a temporary folder."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    module = importlib.import_module("measure")
    (tmp_path / "cards").mkdir()
    monkeypatch.setattr(module, "CARDS", tmp_path / "cards")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    commands: list[list[str]] = []
    module.commands = commands  # type: ignore[attr-defined]

    def run(command: list[str], gpu: bool) -> None:
        commands.append(command)
        monkeypatch.setattr(sys, "argv", command[1:])
        AcceleratorState._reset_state(reset_partial_state=True)
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(Path(command[1]).stem).main()

    monkeypatch.setattr(module, "launch", run)
    return module
