"""Block sizes of the Triton kernels, from the JSON files in `tables/` and those that `tune` wrote on this machine.

A table maps kernel -> "<dtype>-<width>" -> [block_m, block_n, num_warps, num_stages], or these and max_registers, where
width is the least of WIDTHS that holds D and Dv. Rows of 96 and 192 are two chunks of columns, which need more
registers than one. "-grouped" behind the width, where it is there, is for query heads that share key heads, which need
more registers too, and "-monomial" for monomials, which need fewer. Nothing is timed when a kernel is first called.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..cache import user_cache

KERNELS = ("forward", "grad_query", "grad_key_value", "decode")
DTYPES = ("bfloat16", "float16", "float32")
WIDTHS = (64, 96, 128, 192, 256)
#: Bytes of shared memory that one program may have, of the smallest device that each shipped table is for.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
_SHIPPED = Path(__file__).parent / "tables"


class Configuration(NamedTuple):
    """How a kernel is compiled.

    Attributes:
        block_m: rows of queries in a tile.
        block_n: rows of keys in a tile.
        num_warps: warps of a program.
        num_stages: stages of its pipeline.
        max_registers: registers that a thread may have; those of a program are at most 65,536. None leaves it to ptxas,
            which sometimes spills a few bytes to stay below a number of its own, and seldom when told 255.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def row(self) -> list[int]:
        """Returns the configuration as tables hold it."""
        return [number for number in self if number is not None]


Table = dict[str, dict[str, Configuration]]


def local_folder() -> Path:
    """Returns where `tune` writes: $POLYATTN_TUNING, or tuning in `user_cache`."""
    return Path(os.environ.get("POLYATTN_TUNING") or user_cache() / "tuning")


def read_table(path: Path) -> Table:
    """Returns the configurations in a JSON table."""
    kernels = json.loads(path.read_text())["configurations"]
    return {kernel: {key: Configuration(*row) for key, row in rows.items()} for kernel, rows in kernels.items()}


def write_table(table: Table, device: str, folder: Path) -> Path:
    """Writes a table beside its place and renames it; returns the path that `configuration` reads for the device."""
    path = folder / f"{_slug(device)}.json"
    rows = ",\n".join(
        f'    "{kernel}": {{\n' + ",\n".join(f'      "{key}": {row.row()}' for key, row in rows.items()) + "\n    }"
        for kernel, rows in table.items()
    )
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(f'{{\n  "device": {json.dumps(device)},\n  "configurations": {{\n{rows}\n  }}\n}}\n')
    partial.replace(path)
    configuration.cache_clear()
    return path


def shipped_tables() -> dict[int, Table]:
    """Returns the tables of this package by compute capability, 80 for 8.0."""
    paths = (path for path in _SHIPPED.glob("sm*.json"))
    return dict(sorted((int(path.stem.removeprefix("sm")), read_table(path)) for path in paths))


def keys(dtype: torch.dtype, width: int, monomial: bool = False, grouped: bool = False) -> tuple[str, ...]:
    """Returns the keys of a table's rows that fit a call, the best first."""
    key = f"{str(dtype).removeprefix('torch.')}-{next(limit for limit in WIDTHS if width <= limit)}"
    variants = (f"{key}-grouped",) * grouped + (f"{key}-monomial",) * monomial
    return (*variants, key)


def row_of(table: Table, kernel: str, keys: tuple[str, ...]) -> Configuration | None:
    """Returns the configuration of a kernel in one table, None if it has none."""
    rows = table.get(kernel, {})
    return next((rows[key] for key in keys if key in rows), None)


@functools.cache
def configuration(kernel: str, keys: tuple[str, ...], device: torch.device) -> Configuration:
    """Returns the configuration of a kernel.

    A table for the device's name comes first, from `local_folder` and then from this package; then the shipped one of
    the highest compute capability that is not above the device's, and whose rows fit its shared memory.

    Args:
        kernel: one of KERNELS.
        keys: of the rows that fit the call, the best first.
        device: a CUDA device.
    """
    name = f"{_slug(torch.cuda.get_device_name(device))}.json"
    named = (read_table(path) for path in (local_folder() / name, _SHIPPED / name) if path.exists())
    for table in (*named, shipped_tables()[_nearest(device)]):
        row = row_of(table, kernel, keys)
        if row is not None:
            return row
    raise KeyError(f"no configuration of {kernel} for {keys[-1]}")  # tests/ops/test_triton.py: never


def _nearest(device: torch.device) -> int:
    """Returns the compute capability of the shipped table that fits a device best."""
    major, minor = torch.cuda.get_device_capability(device)
    properties: Any = torch.cuda.get_device_properties(device)
    older = [capability for capability in SHARED_MEMORY if capability <= 10 * major + minor]
    fitting = [
        capability for capability in older if SHARED_MEMORY[capability] <= properties.shared_memory_per_block_optin
    ]
    return max(fitting) if fitting else min(SHARED_MEMORY, key=SHARED_MEMORY.__getitem__)


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
