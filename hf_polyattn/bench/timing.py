"""Times that mean something beside each other: steps take turns in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def alternate(
    steps: Mapping[str, Callable[[], object]], repeats: int, device: str, *, queued: int = 1
) -> dict[str, float]:
    """Returns each step's median milliseconds; the steps take turns, after one warm-up each.

    Args:
        steps: what is run.
        repeats: turns of which the median is taken.
        device: cpu or cuda.
        queued: runs of a turn; on a GPU they wait behind each other, so that the time to launch them stays hidden, as
            it is in training.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            _synchronize(device)
            started = time.perf_counter()
            for _ in range(queued):
                step()
            _synchronize(device)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - started) / queued)
    return {name: round(statistics.median(record), 4) for name, record in times.items()}


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Returns the GFLOP/s of one large square matrix product: the best of five."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        _synchronize(device)
        started = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best / 1e9


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
