"""What the tests of the recipes share: how one is run and what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., dict[str, Any]]


@contextmanager
def recipes_on_path() -> Iterator[pytest.MonkeyPatch]:
    """Lets this process import recipes and what they share, and keeps them on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield patch


def options(output: Path) -> list[str]:
    return ["--output_dir", str(output), "--disable_tqdm", "true", "--report_to", "none"]


def losses(arm: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in arm["log_history"] if "loss" in entry]


def environment() -> dict[str, str]:
    """Of another process: it sums in the same order as this one."""
    threads = str(torch.get_num_threads())
    return {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": threads, "ACCELERATE_USE_CPU": "true"}


# Runs a recipe, and kills it while it writes the checkpoint of step 4 of the arm poly3.
_KILLED_WHILE_SAVING = """
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


def killed_while_saving(output: Path, words: list[str]) -> None:
    """Runs causal_lm.py in another process, which dies of SIGKILL within the checkpoint of step 4 of the arm poly3."""
    command = [sys.executable, "-c", _KILLED_WHILE_SAVING, *words, *options(output)]
    killed = subprocess.run(command, cwd=ROOT, env=environment(), check=False)
    assert killed.returncode == -signal.SIGKILL
