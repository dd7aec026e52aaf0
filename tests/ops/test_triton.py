"""Backend `triton` as far as it can be tested without a GPU: the kernels in Triton's interpreter, tables, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from error_budget import operands

from hf_polyattn import BackendError, polynomial_attention
from hf_polyattn.ops.triton import tuning
from hf_polyattn.ops.triton.tuning import DTYPES, KERNELS, WIDTHS, Configuration

TESTS = Path(__file__).parent
PARTS = 3


@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_in_the_interpreter(part: int) -> None:
    pytest.importorskip("triton")
    threads = str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "INTERPRETER_PART": f"{part}/{PARTS}", "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(TESTS / "interpreter")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_backend_asked_for_without_a_gpu_says_what_it_needs() -> None:
    with pytest.raises(BackendError, match=r"'triton' cannot run this call: it needs a CUDA device.*device cpu"):
        polynomial_attention(*operands(dtype=torch.float32), backend="triton")


def test_shipped_tables_have_every_kernel_dtype_and_width() -> None:
    tables = tuning.shipped_tables()
    assert list(tables) == list(tuning.SHARED_MEMORY) == [80, 86, 90, 100, 120]
    for table in tables.values():
        assert set(table) == set(KERNELS)
        for rows in table.values():
            assert {f"{dtype}-{width}" for dtype in DTYPES for width in WIDTHS} <= set(rows)
            for key, row in rows.items():
                assert all(size >= 16 and size & (size - 1) == 0 for size in row[:2]), key
                assert row.num_warps in (1, 2, 4, 8), key
                assert 32 * row.num_warps * (row.max_registers or 0) <= 65_536, key  # else it could not be launched


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kibibytes: int) -> None:
    """Makes PyTorch report a device of this compute capability and shared memory."""
    properties = SimpleNamespace(shared_memory_per_block_optin=1024 * kibibytes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize(
    ("device", "capability", "kibibytes", "table"),
    [
        ("A100", (8, 0), 163, 80), ("RTX 3090", (8, 6), 99, 86), ("Orin", (8, 7), 163, 86), ("L40S", (8, 9), 99, 86),
        ("H200", (9, 0), 227, 90), ("B200", (10, 0), 227, 100), ("B300", (10, 3), 227, 100),
        ("RTX 5090", (12, 0), 99, 120), ("GB10", (12, 1), 99, 120), ("unknown, small", (11, 0), 99, 86),
        ("unknown, smaller", (13, 0), 64, 86),
    ],
)  # fmt: skip
def test_a_device_takes_the_newest_table_that_fits_its_shared_memory(
    device: str, capability: tuple[int, int], kibibytes: int, table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability, kibibytes)
    assert tuning._nearest(torch.device("cuda", 0)) == table


def test_tables_are_found_by_device_then_by_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYATTN_TUNING", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (test)")
    pretend(monkeypatch, (9, 0), 227)
    device = torch.device("cuda", 0)
    tuning.configuration.cache_clear()
    shipped, keys = tuning.shipped_tables()[90], tuning.keys(torch.bfloat16, 80)
    assert keys == ("bfloat16-96",)
    assert tuning.configuration("forward", keys, device) == shipped["forward"]["bfloat16-96"]

    own, limited = Configuration(32, 16, 2, 1), Configuration(32, 16, 2, 1, max_registers=128)
    path = tuning.write_table(
        {"forward": {"bfloat16-96": own}, "decode": {"bfloat16-96": limited}}, "NVIDIA H200 (test)", tmp_path
    )
    assert path == tmp_path / "nvidia-h200-test.json"
    assert list(tmp_path.iterdir()) == [path]  # no partial file is left
    assert tuning.configuration("forward", keys, device) == own
    assert tuning.configuration("decode", keys, device) == limited
    assert tuning.configuration("forward", tuning.keys(torch.bfloat16, 64), device) == shipped["forward"]["bfloat16-64"]

    pretend(monkeypatch, (8, 7), 163)
    tuning.configuration.cache_clear()
    older = tuning.shipped_tables()[86]["decode"]["float16-64"]
    assert tuning.configuration("decode", tuning.keys(torch.float16, 64, True, True), device) == older
    tuning.configuration.cache_clear()
