"""Backend `cpu`: the C++ kernels compute the formula of DESIGN.md, and are built once, by whoever comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from error_budget import excess, operands, outputs_and_gradients
from kernel_cases import (
    BUMP,
    CASES,
    EMPTY,
    MASKS,
    Case,
    Shape,
    check_empty_tensors,
    check_layout_of_gradients,
    check_library_contract,
    check_rows_that_see_nothing,
    dropout_pattern,
    errors,
    errors_with_and_without_masks,
    inputs,
    interval,
    noise,
)
from torch import Tensor

from hf_polyattn import BackendError, PolyAttentionConfig, Polynomial, polynomial_attention
from hf_polyattn.ops import backends
from hf_polyattn.ops.call import Call
from hf_polyattn.patching import core

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

# Beyond one tile of rows and of keys, one chunk of rows, and one part of the keys of a decoding step.
LONG: dict[str, Case] = {
    "T1000": Case(lambda s: interval(s, normalizer="l1", power=16), BUMP, (1, 2, 1, 1000, 1000), (64, 64)),
    "T600-causal": Case(lambda s: interval(s, causal=True), BUMP, (1, 4, 2, 600, 600)),
    "T300-window": Case(lambda s: {"window": 70, "normalizer": "mean"}, shape=(1, 2, 2, 300, 520)),
    "odd-dims": Case(lambda s: interval(s, normalizer="l1"), BUMP, (2, 2, 1, 129, 63), (5, 3)),
    "decode-long": Case(lambda s: interval(s, normalizer="l1", power=16), BUMP, (1, 8, 2, 1, 1300), (64, 64)),
}
ALL = {**CASES, **LONG}


@dtypes
@pytest.mark.parametrize("case", ALL)
def test_kernels_are_within_the_error_budget(case: str, dtype: torch.dtype) -> None:
    for name, error in errors(ALL[case], dtype, "cpu", draws=8).items():
        assert error <= 1.0, name


@pytest.mark.parametrize("case", [case for case in MASKS if "dropout" not in case])
def test_a_mask_that_is_dropped_shows(case: str) -> None:
    with_masks, without_masks = errors_with_and_without_masks(CASES[case], torch.bfloat16, "cpu")
    assert with_masks <= 1.0
    assert without_masks > 2.0


@pytest.mark.parametrize("wrong", [{"normalizer": "mean"}, {"power": 2}, {"clamp": False}, {"center": 0.0}], ids=str)
def test_error_budget_notices_a_wrong_polynomial(wrong: dict[str, Any]) -> None:
    tensors, settings = inputs(LONG["odd-dims"], torch.bfloat16, 0, "cpu")
    exact = outputs_and_gradients([tensor.double() for tensor in tensors], **settings, backend="reference")
    same_dtype = outputs_and_gradients(tensors, **settings, backend="reference")
    candidate = outputs_and_gradients(tensors, **{**settings, **wrong}, backend="cpu")
    for name in ("output", "query", "key", "value", "coefficients"):
        assert excess(candidate[name], same_dtype[name], exact[name]) > 2.0, name


@pytest.mark.parametrize("q_len", [1, 40])
@pytest.mark.parametrize("probability", [0.1, 0.6])
def test_kernels_drop_the_weights_that_other_backends_drop(probability: float, q_len: int) -> None:
    dropped = dropout_pattern("cpu", probability, (q_len, 40))
    assert torch.equal(dropped, dropout_pattern("chunked", probability, (q_len, 40)))
    assert not torch.equal(dropped, dropout_pattern("chunked", probability, (q_len, 40), seed=1))


@pytest.fixture
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", ["T600-causal", "T1000", "decode-long", "dropout-l1-mask"])
def test_two_runs_are_equal_to_the_bit(case: str, threads: int) -> None:
    torch.set_num_threads(threads)
    tensors, settings = inputs(ALL[case], torch.bfloat16, 0, "cpu")
    runs = []
    for _ in range(3):
        torch.manual_seed(0)
        runs.append(outputs_and_gradients(tensors, **settings, backend="cpu"))
    for name, first in runs[0].items():
        assert all(torch.equal(first, run[name]) for run in runs[1:]), name


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("case", ["T600-causal", "T1000", "decode-long"])
def test_another_number_of_threads_stays_within_the_budget(case: str) -> None:
    torch.set_num_threads(2)
    for name, error in errors(ALL[case], torch.float32, "cpu").items():
        assert error <= 1.0, name


@dtypes
@pytest.mark.parametrize("normalizer", ["rsqrt", "l1"])
@pytest.mark.parametrize("power", [1, 4])
def test_rows_that_see_nothing_are_zero_and_harmless(normalizer: str, power: int, dtype: torch.dtype) -> None:
    check_rows_that_see_nothing("cpu", normalizer, power, dtype)


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("normalizer", ["rsqrt", "l1"])
def test_empty_tensors_give_zeros(shape: Shape, normalizer: str) -> None:
    check_empty_tensors("cpu", shape, normalizer, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_lie_as_their_operands(dtype: torch.dtype) -> None:
    check_layout_of_gradients("cpu", dtype)


@pytest.mark.parametrize("layout", ["expanded", "sliced", "last-dim-strided"])
def test_any_strides_are_read_where_they_lie(layout: str) -> None:
    tensors = [
        tensor.detach() for tensor in operands((2, 2, 2, 20, 20), head_dim=16, value_dim=16, dtype=torch.bfloat16)
    ]
    expected = polynomial_attention(*tensors, backend="cpu")
    if layout == "expanded":
        tensors[1:3] = [tensor[:1].expand(2, -1, -1, -1) for tensor in tensors[1:3]]
        expected = polynomial_attention(*(tensor.contiguous() for tensor in tensors), backend="cpu")
    elif layout == "sliced":
        fused = torch.cat(tensors[:3], dim=-1)
        tensors[:3] = fused[..., :16], fused[..., 16:32], fused[..., 32:]
    else:
        tensors[:3] = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in tensors[:3]]
    assert torch.equal(polynomial_attention(*tensors, backend="cpu"), expected)


# The operator and the compiler ----------------------------------------------------------------------------------


def attend(*tensors: Tensor) -> Tensor:
    query, key, value, coefficients, center = tensors
    return polynomial_attention(
        query, key, value, coefficients, causal=True, center=center, radius=2.0, clamp=True, power=2, normalizer="l1",
        backend="auto",
    )  # fmt: skip


@dtypes
def test_compiled_operator_equals_eager_at_every_length(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for length in (12, 19, 23, 31):
        tensors = operands((2, 4, 2, length, length), dtype=dtype)
        tensors.append(noise(2, 4, length).requires_grad_())
        results = []
        for function in (attend, compiled):
            output = function(*tensors)
            results.append((output, *torch.autograd.grad(output.float().square().sum(), tensors)))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("settings", [{}, {"normalizer": "l1", "power": 4, "clamp": True, "radius": 2.0}], ids=str)
def test_operator_obeys_the_library_contract(settings: dict[str, Any]) -> None:
    call = Call(
        *(tensor.detach() for tensor in operands((2, 4, 2, 20, 12), dtype=torch.bfloat16)),
        mask=None, ranges=None, center=noise(2, 4, 20), radius=None, seed=None, causal=True, window=5, scaling=0.5,
        power=settings.get("power", 1), normalizer=settings.get("normalizer", "rsqrt"),
        clamp=settings.get("clamp", False), monomial=False, dropout=0.0,
    )  # fmt: skip
    check_library_contract([*(getattr(call, name) for name in Call.__slots__), "cpu"])


def test_auto_takes_the_kernels_and_float64_the_reference_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    load = backends.Backend.load
    monkeypatch.setattr(backends.Backend, "load", lambda row: chosen.append(row.module) or load(row))
    polynomial_attention(*operands(dtype=torch.bfloat16))
    polynomial_attention(*operands(dtype=torch.float64))
    assert chosen == ["cpu.launch", "chunked"]
    with pytest.raises(BackendError, match=r"'cpu' cannot run this call: it computes in float32, .* float64"):
        polynomial_attention(*operands(dtype=torch.float64), backend="cpu")


# The build ------------------------------------------------------------------------------------------------------

SMALL_MATRIX = ("interval", "power16", "packed-causal", "dropout-l1-mask", "D80", "grouped", "decode3-l1", "odd-dims")
RUN_SMALL_MATRIX = f"""
import torch
from test_cpu import ALL, errors
capability = torch.backends.cpu.get_cpu_capability()
for case in {SMALL_MATRIX!r}:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        worst = max(errors(ALL[case], dtype, "cpu", draws=8).values())
        assert worst <= 1.0, (case, dtype, worst)
print(capability, "passed")
"""


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_kernels_for_lesser_machines_are_right_too(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    # oneDNN reads its own variable: without it, it multiplies as on this machine
    environment["ONEDNN_MAX_CPU_ISA"] = {"avx2": "AVX2", "default": "SSE41"}[capability]
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", RUN_SMALL_MATRIX]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:] == [capability.upper(), "passed"]


def test_a_layer_promises_a_monomial_only_while_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    promises: list[bool] = []
    monkeypatch.setattr(core, "polynomial_attention", lambda *args, monomial, **kwargs: promises.append(monomial))
    monkeypatch.setattr(core, "fused_layer", lambda *args, **kwargs: None)  # which looks for itself
    layer = core.PolyAttention(PolyAttentionConfig(Polynomial.parse("poly3")), heads=2, head_dim=4)
    query = torch.zeros(1, 2, 3, 4)
    with torch.no_grad():
        layer(query, query, query)
    layer(query, query, query)  # all coefficients are trained
    with torch.no_grad():
        layer.coefficients.data[0, 1] = 0.1
        layer(query, query, query)
    assert promises == [True, False, False]
