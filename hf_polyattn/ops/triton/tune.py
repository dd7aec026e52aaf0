"""Times candidate configurations of the Triton kernels on this machine's GPU and writes a table of the fastest.

`polyattn bench --tune` calls it; nothing else does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..call import Call
from .tuning import WIDTHS, Configuration, Table, keys, local_folder, write_table


def _grid(*sizes: Sequence[int]) -> tuple[Configuration, ...]:
    return tuple(Configuration(*row) for row in product(*sizes))


# Rows of queries, rows of keys, warps, stages.
CANDIDATES: dict[str, tuple[Configuration, ...]] = {
    "forward": _grid((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "grad_query": _grid((64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)),
    "grad_key_value": _grid((16, 32, 64), (32, 64, 128), (4, 8), (1, 2, 3)),
    "decode": _grid((16,), (16, 32, 64, 128), (2, 4), (2, 3, 4)),
}
# Largest difference from the shipped configuration's result, over its largest value: another order of summation.
_TOLERANCE = 2e-2

Measure = Callable[[Callable[[], object]], float]


def milliseconds(run: Callable[[], object], repeats: int = 5, queued: int = 5) -> float:
    """Returns the median time of a run on the current CUDA device, some queued behind each other."""
    times = []
    for _ in range(repeats + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(queued):
            run()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)) / queued)
    return statistics.median(times[1:])


def tune(
    device: torch.device,
    name: str,
    *,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16),
    widths: Sequence[int] = WIDTHS,
    length: int = 4096,
    tokens: int = 2**15,
    candidates: dict[str, tuple[Configuration, ...]] = CANDIDATES,
    folder: Path | None = None,
    measure: Measure = milliseconds,
    report: Callable[[str], object] = print,
) -> Path:
    """Writes a table of the fastest configuration of every kernel, dtype and head dim, and returns its path.

    A candidate whose result differs from that of the shipped configuration, or that does not fit the device, is left
    out.

    Args:
        device: where the kernels run.
        name: of the device, by which the table is found again.
        dtypes, widths, length, tokens: what is timed; head dims are the widths, and the batch is tokens / length.
        candidates: kernel -> configurations to try.
        folder: where the table goes, `local_folder()` if None.
        measure: returns the time of a run.
        report: gets a line for every row of the table.
    """
    table: Table = {kernel: {} for kernel in candidates}
    variants: tuple[dict[str, bool], ...] = ({"monomial": True}, {}, {"grouped": True})
    cases = [
        (kernel, dtype, width, variant)
        for dtype, width, variant, kernel in product(dtypes, widths, variants, candidates)
        if "grouped" not in variant or kernel == "grad_key_value"
    ]
    if device.type == "cuda":
        _compile([(*case, row, device, length) for case in cases for row in candidates[case[0]]])
    for kernel, dtype, width, variant in cases:
        call = _call(device, dtype, width, (max(1, tokens // length), length), **variant)
        best = _fastest(kernel, candidates[kernel], call, measure)
        if best is not None:
            key = keys(dtype, width, **variant)[0]
            table[kernel][key], spent = best
            report(f"{kernel} {key}: {tuple(table[kernel][key])}, {spent:.3f} ms")
    return write_table(table, name, local_folder() if folder is None else folder)


def _compile(jobs: Sequence[tuple[Any, ...]]) -> None:
    """Fills Triton's cache with the kernels of all candidates, in as many processes as there are cores."""
    processes = min(os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile_one, jobs))


def _compile_one(job: tuple[Any, ...]) -> None:
    from . import launch as backend

    kernel, dtype, width, variant, row, device, length = job
    call = _call(device, dtype, width, (1, length), **variant)
    with contextlib.suppress(Exception), _trying(kernel, row):  # what fails here is left out where it is timed
        _run(kernel, call, backend)()


def _fastest(
    kernel: str, rows: Sequence[Configuration], call: Call, measure: Measure
) -> tuple[Configuration, float] | None:
    """Returns the fastest configuration that gives the right result, and its time."""
    import triton

    from . import launch as backend

    run = _run(kernel, call, backend)
    expected = run()
    best: tuple[Configuration, float] | None = None
    for row in rows:
        with _trying(kernel, row):
            try:
                result = run()
            except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
                continue
            pairs = zip(result, expected, strict=True)
            if not all((one - two).abs().max() <= _TOLERANCE * two.abs().max() for one, two in pairs):
                continue
            spent = measure(run)
        if best is None or spent < best[1]:
            best = row, spent
    return best


def _run(kernel: str, call: Call, backend: Any) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Returns what runs a kernel, by itself or with those that do not change."""
    if kernel == "decode":
        call = replace(call, query=call.query[:, :, :1], center=None, causal=False)
    if kernel in ("forward", "decode"):
        return lambda: backend.forward(call)[:1]
    output, row_scale = backend.forward(call)
    options = {"coefficients_grad": True, "center_grad": True}
    return lambda: backend.backward(output, output, row_scale, call, **options)[:3]


@contextlib.contextmanager
def _trying(kernel: str, row: Configuration) -> Iterator[None]:
    from . import layout

    usual, tried = layout.configuration_of, kernel

    def configuration_of(kernel: str, call: Call) -> Configuration:
        return row if kernel == tried else usual(kernel, call)

    layout.configuration_of = configuration_of
    try:
        yield
    finally:
        layout.configuration_of = usual


def _call(
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    shape: tuple[int, int],
    *,
    monomial: bool = False,
    grouped: bool = False,
) -> Call:
    """A causal call of 8 heads: the bare cubic, or the degree 4 over its row sum that calibration sets."""
    (batch, length), heads = shape, 8
    groups = 2 if grouped else heads
    query, key, value = (
        torch.randn(batch, count, length, width, device=device, dtype=dtype) for count in (heads, groups, groups)
    )
    row = [0.0, 0.0, 0.0, 1.0] if monomial else [1.0, 1.0, 1 / 2, 1 / 6, 1 / 24]
    return Call(
        query=query,
        key=key,
        value=value,
        coefficients=torch.tensor([row] * heads, device=device),
        mask=None,
        ranges=None,
        center=None if monomial else torch.zeros(batch, heads, length, device=device),
        radius=None if monomial else torch.full((heads,), 4.0, device=device),
        seed=None,
        causal=True,
        window=None,
        scaling=width**-0.5,
        power=1,
        normalizer="rsqrt" if monomial else "l1",
        clamp=not monomial,
        monomial=monomial,
        dropout=0.0,
    )
