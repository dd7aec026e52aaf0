"""What attention needs beside its inputs, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .attention import Attention, polynomial, run_once, softmaxes
from .cases import SPECS, Case, dtype_name

MEMORY = {"cpu": Case(1, 8, 8, 8192, 64), "cuda": Case(1, 16, 16, 16384, 64)}


def memory_peaks(device: str, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    """Returns the peak of extra memory, in MiB, of a forward and backward pass of one long sequence."""
    names = ["sdpa", *(str(spec) for spec in SPECS)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        peaks = [pool.submit(_peak, name, device, dtype, backend).result() for name in names]
    return {"case": str(MEMORY[device]), "dtype": dtype_name(dtype), "mib": dict(zip(names, peaks, strict=True))}


def _peak(name: str, device: str, dtype: torch.dtype, backend: str) -> float:
    case = MEMORY[device]
    small = replace(case, length=128).tensors(device, dtype)
    tensors = case.tensors(device, dtype)

    def attention(tensors: list[Tensor], case: Case) -> Attention:
        if name == "sdpa":
            return softmaxes(device, dtype, case)["sdpa"]
        return polynomial(next(spec for spec in SPECS if str(spec) == name), case, tensors, backend)

    run_once(attention(small, replace(case, length=128)), small, "forward_backward")  # libraries load
    attend = attention(tensors, case)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(attend, tensors, "forward_backward")
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    status = Path("/proc/self/status")

    def field(key: str) -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = field("VmRSS")
    run_once(attend, tensors, "forward_backward")
    return round((field("VmHWM") - before) / 2**10, 1)
