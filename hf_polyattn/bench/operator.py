"""The operator next to softmax, case by case, forward and with backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from .attention import Attention, polynomial, run_once, softmaxes
from .cases import CASES, SPECS, dtype_name
from .timing import alternate, matmul_rate
from .verification import verify


def time_cases(device: str, dtype: torch.dtype, backend: str, repeats: int) -> Iterator[list[dict[str, Any]]]:
    """Yields one row for each spec of a case: median milliseconds of ours and of every softmax, and the speedups.

    Raises:
        VerificationError: a case is wrong.
    """
    cases = CASES[device]
    progress = tqdm(total=len(cases), desc=f"bench {dtype_name(dtype)}")
    for case in cases:
        tensors = case.tensors(device, dtype)
        ours = {str(spec): polynomial(spec, case, tensors, backend) for spec in SPECS}
        for name, attend in ours.items():
            verify(attend, tensors, f"{case} {name}")
        everyone: dict[str, Attention] = {**softmaxes(device, dtype, case), **ours}
        passes = ("forward",) if case.queries else ("forward", "forward_backward")
        times = {
            name: alternate(
                {k: partial(run_once, f, tensors, name) for k, f in everyone.items()},
                repeats,
                device,
                queued=8 if device == "cuda" else 1,
            )
            for name in passes
        }
        rows = []
        rate = matmul_rate(device, dtype)
        for spec in SPECS:
            row: dict[str, Any] = {"case": str(case), **asdict(case), "spec": str(spec), "dtype": dtype_name(dtype)}
            for name in passes:
                softmax = {peer: ms for peer, ms in times[name].items() if peer not in ours}
                ms, best = times[name][str(spec)], min(softmax.values())
                limit = case.flops * (1.0 if name == "forward" else 3.5) / rate / 1e6
                row[name] = {
                    "ms": ms,
                    "softmax_ms": softmax,
                    "speedup": round(best / ms, 3),
                    "limit_ms": round(limit, 3),
                    "limit_speedup": round(best / limit, 3),
                }
            rows.append(row)
        yield rows
        progress.update()
    progress.close()
