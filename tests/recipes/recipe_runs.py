"""What the tests of the recipes share: how one is run and what it says."""

from __future__ import annotations

import os
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
