"""Tests of the Triton kernels on the CPU. They need TRITON_INTERPRET=1 before Triton is imported, and so a process of
their own: tests/ops/test_triton.py starts it, in parts.
"""

from __future__ import annotations

import os
from typing import Any

import numpy
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps one part of the tests: INTERPRETER_PART=1/3 is the second of three."""
    part, parts = map(int, os.environ.get("INTERPRETER_PART", "0/1").split("/"))
    items[:] = items[part::parts]


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are rounded once. The interpreter has numpy's, which are as exact as its BLAS for a processor: on some
    they alone take one and a half times the error budget.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, one: Any, other: Any, added: Any, *precision: Any) -> Any:
        product = numpy.matmul(one.data.astype(numpy.float64), other.data.astype(numpy.float64))
        return TensorHandle((product + added.data).astype(added.data.dtype), added.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def _poison() -> None:
    """Fills memory that a kernel should write with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
