"""Times the operator next to softmax attention on this machine; every timed case is verified first.

    python -m hf_polyattn.bench --output outputs/bench

Only ratios of times measured in turns in one run mean something: speedup = softmax's median / ours. Softmax is
`torch.nn.functional.scaled_dot_product_attention` as PyTorch dispatches it by default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import PolyAttnError
from .ops import BACKENDS, polynomial_attention
from .patch import format_table
from .spec import Polynomial


@dataclass(frozen=True, slots=True)
class Case:
    """One timed shape: batch, query heads, key/value heads, length, head dim, and whether it is causal."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"B{self.batch}-H{heads}-T{self.length}-D{self.head_dim}{'-causal' if self.causal else ''}"


CASES = {
    "cpu": (
        Case(8, 12, 12, 128, 64, False),
        Case(4, 12, 12, 512, 64, False),
        Case(4, 12, 12, 197, 64, False),
        Case(1, 12, 12, 2048, 64, False),
        Case(1, 8, 2, 2048, 64, True),
    ),
    "cuda": (
        Case(16, 16, 16, 2048, 64, False),
        Case(16, 16, 16, 2048, 64, True),
        Case(4, 16, 16, 8192, 64, True),
        Case(4, 16, 16, 8192, 128, True),
    ),
}
SPECS = ("poly3", "poly6-l1", "poly3^16-l1")


class VerificationError(PolyAttnError):
    """A backend whose result is not that of the oracle within the error budget; it is not timed."""


def bench(device: str, dtype: torch.dtype, backend: str, repeats: int) -> list[dict[str, Any]]:
    """Returns one row for each case and spec: median milliseconds of both, forward and forward + backward.

    Raises:
        VerificationError: a case is wrong.
    """
    rows = []
    for case in CASES["cuda" if device == "cuda" else "cpu"]:
        tensors = [torch.randn(case.batch, case.heads, case.length, case.head_dim, device=device, dtype=dtype)]
        shape = (case.batch, case.kv_heads, case.length, case.head_dim)
        tensors += [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]
        for spec in SPECS:
            run, coefficients = _polynomial(spec, case, backend, device)
            _verify(run, tensors, case, spec)
            times = {}
            for name, backward in (("forward", False), ("forward_backward", True)):
                steps = [partial(_step, attend, tensors, coefficients, backward) for attend in (run, _softmax(case))]
                ours, softmax = _alternate(steps, repeats, device)
                times[name] = {"ms": ours, "softmax_ms": softmax, "speedup": round(softmax / ours, 3)}
            rows.append({"case": str(case), **asdict(case), "spec": spec, "dtype": str(dtype), **times})
            print(_line(rows[-1]), flush=True)
    return rows


def _polynomial(spec: str, case: Case, backend: str, device: str) -> tuple[Callable[..., Tensor], Tensor]:
    """Returns the operator as a calibrated layer calls it (bare for poly3), and its coefficients."""
    polynomial = Polynomial.parse(spec)
    coefficients = torch.tensor([polynomial.initial_coefficients()] * case.heads, device=device, requires_grad=True)
    calibrated = spec != "poly3"

    def run(query: Tensor, key: Tensor, value: Tensor, c: Tensor = coefficients, backend: str = backend) -> Tensor:
        return polynomial_attention(
            query,
            key,
            value,
            c,
            causal=case.causal,
            power=polynomial.power,
            normalizer=polynomial.normalizer,
            center=0.5 if calibrated else 0.0,
            radius=6.0 if calibrated else 1.0,
            clamp=calibrated,
            backend=backend,
        )

    return run, coefficients


def _softmax(case: Case) -> Callable[..., Tensor]:
    grouped = case.heads != case.kv_heads
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)


def _verify(run: Callable[..., Tensor], tensors: list[Tensor], case: Case, spec: str) -> None:
    """Compares one batch entry with the float64 oracle: at most twice the error of the same-dtype reference."""
    small = [tensor[:1] for tensor in tensors]
    exact = run(*(tensor.double() for tensor in small), backend="reference")
    budget = 2.0 * (run(*small, backend="reference").double() - exact).abs().max()
    budget = budget + torch.finfo(small[0].dtype).eps * exact.abs().max()
    error = (run(*small).double() - exact).abs().max()
    if not error <= budget:
        raise VerificationError(f"{case} {spec}: error {error:.3g} exceeds the budget {budget:.3g}; not timed")


def _step(run: Callable[..., Tensor], tensors: list[Tensor], coefficients: Tensor, backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            run(*tensors)
        return
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    coefficients.grad = None
    run(*leaves).sum().backward()  # type: ignore[no-untyped-call]


def _alternate(steps: Sequence[Callable[[], None]], repeats: int, device: str) -> list[float]:
    """Returns each step's median milliseconds; the steps take turns, after one warm-up each."""
    times: list[list[float]] = [[] for _ in steps]
    for turn in range(repeats + 1):
        for step, record in zip(steps, times, strict=True):
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                record.append(1e3 * (time.perf_counter() - started))
    return [round(statistics.median(record), 3) for record in times]


def _line(row: dict[str, Any]) -> str:
    speedups = (f"{name} {row[name]['speedup']:.2f}×" for name in ("forward", "forward_backward"))
    return f"{row['case']} {row['spec']}: {', '.join(speedups)} softmax's speed"


def main() -> None:
    """Runs the benchmark from the command line and writes `bench.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None)
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    arguments = parser.parse_args()
    name = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    rows = bench(arguments.device, getattr(torch, name), arguments.backend, arguments.repeats)
    table = [
        (row["case"], row["spec"], *(f"{row[part]['speedup']:.2f}" for part in ("forward", "forward_backward")))
        for row in rows
    ]
    print(format_table(("case", "spec", "forward × softmax", "forward+backward × softmax"), table))
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    results = {
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": name,
        "backend": arguments.backend,
        "repeats": arguments.repeats,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "rows": rows,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    partial = arguments.output / ".bench.json.partial"
    partial.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(partial, arguments.output / "bench.json")


if __name__ == "__main__":
    main()
