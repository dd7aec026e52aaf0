"""Times polynomial attention next to softmax attention on this machine; every timed case is verified first.

    polyattn bench --device cpu --output outputs/bench     # or python -m hf_polyattn bench

Only ratios of times measured in turns in one run mean something: speedup = the fastest softmax's median / ours. Softmax
is `torch.nn.functional.scaled_dot_product_attention` as PyTorch dispatches it by default and, on a GPU, its cuDNN
backend and FlashAttention where they can be imported. Beside each case stands the limit that no attention of two
products can pass: what its multiplications take at the rate of one large matrix product, measured in the same run.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Collection, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..figures import draw_speedups, save
from ..files import written_beside
from .calibration import time_calibration
from .cases import CASES, DTYPES, dtype_name
from .decoding import time_decoding
from .memory import memory_peaks
from .models import time_models
from .operator import time_cases
from .report import tables
from .timing import matmul_rate

#: What `run` measures -> its key in `bench.json`: the operator, whole models, a token after many, what attention needs
#: beside its inputs, and the time of `calibrate`.
PARTS = {
    "operator": "rows",
    "models": "models",
    "decode": "decode",
    "memory": "memory",
    "calibration": "calibration",
}
#: What it measures unless it is told: the last one needs a checkpoint.
USUAL = tuple(PARTS)[:-1]


def run(
    device: str | None,
    dtypes: list[str] | None,
    backend: str,
    repeats: int,
    output: Path,
    *,
    parts: Collection[str] = USUAL,
    tune: bool = False,
) -> None:
    """Runs the benchmark, prints its tables and writes `bench.json` and, of the operator with matplotlib, `bench.png`.

    Args:
        device: cpu or cuda; None takes a GPU if there is one.
        dtypes: names of `DTYPES`; None takes bfloat16, and float32 on a CPU.
        backend: of the operator.
        repeats: runs of which the median is taken.
        output: folder of the files.
        parts: names of `PARTS`: what is measured; the others' lists stay empty.
        tune: write a table of the fastest Triton configurations first.

    Raises:
        InputError: the device is neither, a part is unknown, or the checkpoint of one is not installed.
        VerificationError: a case is wrong.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in CASES:
        raise InputError(f"device must be one of {[*CASES]}, got {device!r}")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise InputError(f"parts must be of {[*PARTS]}, got {unknown}")
    if tune:
        from ..ops.triton.tune import tune as write_table

        print(f"written: {write_table(torch.device(device), _device_name(device))}")
    kinds = [DTYPES[name] for name in dtypes or (["bfloat16"] if device == "cuda" else ["bfloat16", "float32"])]
    results: dict[str, Any] = {
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "repeats": repeats,
        "versions": _versions(device),
        "matmul_gflops": {dtype_name(dtype): round(matmul_rate(device, dtype), 1) for dtype in kinds},
        **{key: [] for key in PARTS.values()},
    }
    measures: dict[str, Callable[[torch.dtype], Iterable[list[dict[str, Any]]]]] = {
        "operator": lambda dtype: time_cases(device, dtype, backend, repeats),
        "models": lambda dtype: time_models(device, dtype, repeats),
        "decode": lambda dtype: time_decoding(device, dtype, repeats),
        "memory": lambda dtype: [[memory_peaks(device, dtype, backend)]],
        "calibration": lambda dtype: time_calibration(device, dtype, repeats),
    }
    for dtype, part in product(kinds, parts):
        for rows in measures[part](dtype):
            results[PARTS[part]] += rows
            with written_beside(output / "bench.json") as partial_file:  # as it grows: what runs long may be cut off
                partial_file.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))
    if not results["rows"]:
        return
    try:
        save(draw_speedups(results), output / "bench.png")
    except ImportError:
        print("bench.png needs matplotlib: pip install matplotlib")


def redraw(results: Path) -> Path:
    """Draws the picture of a `bench.json` again, beside it and under its name; returns its path.

    Raises:
        InputError: no such file, or none that `run` wrote with the operator in it.
        ImportError: matplotlib is not installed.
    """
    try:
        read = json.loads(results.read_text())
        if not read["rows"]:
            raise InputError(f"{results} has no figures of the operator to draw: its list of rows is empty")
        figure = draw_speedups(read)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{results} cannot be drawn, it is no bench.json: {error!r}") from error
    save(figure, results.with_suffix(".png"))
    return results.with_suffix(".png")


def _versions(device: str) -> dict[str, str]:
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        import triton

        cudnn: int = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        versions |= {"triton": triton.__version__, "cudnn": str(cudnn)}
    return versions


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return f"{model or platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
