"""The Triton kernels compute the formula of DESIGN.md, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from error_budget import excess, operands, outputs_and_gradients
from kernel_cases import (
    BUMP,
    CASES,
    EMPTY,
    HALF,
    LAYOUTS,
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
    layout_difference,
)
from torch import Tensor

from hf_polyattn import BackendError, polynomial_attention
from hf_polyattn.ops import library
from hf_polyattn.ops.triton import layout

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


# These take the path of a neighbour that is tested, once more around a loop. The GPU tests keep them.
REPEATED = ("degree4", "degree5", "degree6", "degree7", "power2", "power4", "power8", "window-wide", "causal-square")
SINGLE = [case for case in CASES if case not in REPEATED]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in SINGLE), *((case, torch.float16) for case in HALF)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_kernels_are_within_the_error_budget(case: str, dtype: torch.dtype) -> None:
    for name, error in errors(CASES[case], dtype).items():
        assert error <= 1.0, name


@pytest.mark.parametrize("case", [case for case in MASKS if "dropout" not in case])
def test_error_budget_notices_a_missing_mask(case: str) -> None:
    assert errors_with_and_without_masks(CASES[case], torch.float16, "reference")[1] > 2.0


@pytest.mark.parametrize("probability", [0.1, 0.6])
def test_kernels_drop_the_weights_that_other_backends_drop(probability: float) -> None:
    dropped = dropout_pattern("triton", probability)
    assert torch.equal(dropped, dropout_pattern("chunked", probability))
    assert not torch.equal(dropped, dropout_pattern("chunked", probability, seed=1))


def test_two_runs_are_equal_to_the_bit() -> None:
    tensors, settings = inputs(CASES["dropout-l1-mask"], torch.float16, 0, "cpu")
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(outputs_and_gradients(tensors, **settings, backend="triton"))
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name])
        assert not torch.equal(runs[0][name], runs[2][name])


@dtypes
@pytest.mark.parametrize("normalizer", ["rsqrt", "l1"])
@pytest.mark.parametrize("power", [1, 4])
def test_rows_that_see_nothing_are_zero_and_harmless(normalizer: str, power: int, dtype: torch.dtype) -> None:
    check_rows_that_see_nothing("triton", normalizer, power, dtype)


@pytest.mark.parametrize("q_len", [3, 33], ids=["decode", "forward"])
def test_float16_neither_overflows_nor_loses_rows(q_len: int) -> None:
    """A cube of 100 and weights of e^-60 are outside float16; outputs and gradients are not."""
    tensors = operands((1, 2, 1, q_len, 49), head_dim=16, value_dim=16, dtype=torch.float16)
    large = [10.0 * tensors[0].detach(), 10.0 * tensors[1].detach(), 1e-3 * tensors[2].detach(), tensors[3]]
    cube = {"coefficients": torch.tensor([[0.0, 0.0, 0.0, 1.0]] * 2)}
    scores = 0.25 * (large[0].float() @ large[1].float().mT)
    assert scores.pow(3).abs().max() > 65504
    tiny = {"normalizer": "l1", "power": 32, "clamp": True, "center": 0.0, "radius": 100.0}
    sixtieth = torch.tensor([[0.15, 0.05, 0.0, 0.0]] * 2)  # (0.15 ± 0.05)^32, e^-51 to e^-74
    for operand, coefficients, settings in (
        (large, cube["coefficients"], {"monomial": True}),
        (tensors, sixtieth, tiny),
    ):
        leaves = [*operand[:3], coefficients]
        exact = [leaf.detach().double() for leaf in leaves]
        scale = 1e-4 if operand is large else 1.0
        oracle = outputs_and_gradients(exact, grad_scale=scale, **settings, backend="reference")
        runs = [outputs_and_gradients(leaves, grad_scale=scale, **settings, backend=b) for b in ("triton", "reference")]
        for name in ("output", "query", "key", "value"):
            assert oracle[name].abs().max() < 65504
            assert excess(runs[0][name], runs[1][name], oracle[name]) <= 1.0, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout: str) -> None:
    tensors = operands((2, 4, 2, 7, 20), head_dim=16, value_dim=16, dtype=torch.float32)
    assert layout_difference("triton", layout, tensors) == 0.0


def test_gradients_lie_as_their_operands() -> None:
    check_layout_of_gradients("triton", torch.float32)


def test_offsets_are_64_bit() -> None:
    """Two batch entries that lie 2^31 elements apart; memory that is not touched costs nothing."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    query, key, value, coefficients = (
        tensor.detach() for tensor in operands((2, 1, 1, 4, 20), head_dim=16, value_dim=16, dtype=torch.float16)
    )
    far = torch.empty(2**31 + 20 * 16, dtype=torch.float16).as_strided(key.shape, (2**31, 1, 16, 1))
    far.copy_(key)
    expected = polynomial_attention(query, key, value, coefficients, backend="triton")
    assert torch.equal(polynomial_attention(query, far, value, coefficients, backend="triton"), expected)


@pytest.mark.parametrize("strides", [(0, 2**30, 5, 1), (0, 8, 2**30, 1), (0, 4, 1, 2**30)], ids=str)
def test_offsets_into_a_mask_are_64_bit(strides: tuple[int, ...]) -> None:
    """Heads, keys or query rows of a mask that lie further apart than a 32-bit offset reaches."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    query, key, value, coefficients = (
        tensor.detach() for tensor in operands((1, 3, 3, 4, 5), head_dim=16, value_dim=16, dtype=torch.float16)
    )
    visible = torch.rand(1, 3, 4, 5) > 0.4
    last = sum((size - 1) * stride for size, stride in zip(visible.shape, strides, strict=True))
    far = torch.empty(last + 1, dtype=torch.bool).as_strided(visible.shape, strides)
    far.copy_(visible)
    settings: dict[str, Any] = {"normalizer": "mean", "backend": "triton"}
    expected = polynomial_attention(query, key, value, coefficients, mask=visible, **settings)
    assert torch.equal(polynomial_attention(query, key, value, coefficients, mask=far, **settings), expected)
    other = polynomial_attention(query, key, value, coefficients, mask=visible.roll(1, dims=1), **settings)
    assert not torch.equal(other, expected)


@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("normalizer", ["rsqrt", "l1"])
def test_empty_tensors_give_zeros(shape: Shape, normalizer: str) -> None:
    check_empty_tensors("triton", shape, normalizer, torch.float32)


def test_gradients_not_asked_for_change_no_others() -> None:
    """Without them the row term of l1 comes from the output."""
    case = Case(lambda shape: interval(shape, normalizer="l1", power=4), BUMP)
    tensors, settings = inputs(case, torch.float32, 0, "cpu")
    everything = outputs_and_gradients(tensors, **settings, backend="triton")
    leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
    output = polynomial_attention(*leaves, tensors[3].detach(), **settings, backend="triton")
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    for name, gradient in zip(("query", "key", "value"), torch.autograd.grad(output, leaves, grad_output), strict=True):
        assert (gradient - everything[name]).abs().max() < 1e-5 * everything[name].abs().max()


@pytest.mark.parametrize("case", ["dense-mask", "dropout", "decode3-l1", "monomial3"])
def test_operator_obeys_the_library_contract(case: str) -> None:
    tensors, settings = inputs(CASES[case]._replace(shape=(1, 2, 1, 2, 33)), torch.float32, 0, "cpu")
    calls: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(arguments)
        return attend(*arguments)

    attend = library.attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "attention", record)
        output = polynomial_attention(*(tensor.requires_grad_() for tensor in tensors), **settings, backend="triton")
    assert torch.equal(attend(*calls[0])[0], output)
    check_library_contract(calls[0])


def test_compiled_operator_equals_eager_at_every_length() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def attend(*tensors: Tensor) -> Tensor:
        return polynomial_attention(*tensors, causal=True, normalizer="l1", power=2, radius=2.0, backend="triton")

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for length in (6, 9, 20):
        tensors = operands((1, 2, 1, length, length), head_dim=16, value_dim=16, dtype=torch.float32)
        outputs = [run(*tensors) for run in (compiled, attend)]
        results = [(output, *torch.autograd.grad(output.square().sum(), tensors)) for output in outputs]
        for compiled_result, eager_result in zip(*results, strict=True):
            assert torch.equal(compiled_result, eager_result)
    assert counter.frame_count == 2  # the first length as a constant, then every length


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "dtype float64"),
        ({"dtype": torch.bfloat16}, "interpreter computes bfloat16 products wrongly"),
        ({"head_dim": 257}, "head dims above 256: 257 and 3"),
    ],
    ids=["float64", "bfloat16", "wide"],
)
def test_what_cannot_run_is_refused_with_the_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BackendError, match=f"'triton' cannot run this call: .*{reason}"):
        polynomial_attention(*operands(**{"dtype": torch.float32, **change}), backend="triton")


def test_radius_gradient_and_weights_are_refused() -> None:
    tensors = operands(dtype=torch.float32)
    with pytest.raises(BackendError, match="no gradient for the radius"):
        polynomial_attention(*tensors, radius=torch.ones(4, requires_grad=True), backend="triton")
    with pytest.raises(BackendError, match="never forms the whole attention weights"):
        polynomial_attention(*tensors, return_weights=True, backend="triton")


def test_calls_use_the_decode_kernel_when_keys_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    launch = layout.launch

    def record(kernel: Any, *arguments: Any, **static: Any) -> None:
        names.append(kernel.__name__)
        launch(kernel, *arguments, **static)

    monkeypatch.setattr(layout, "launch", record)
    for shape, expected in (
        ((1, 2, 1, 1, 40), ["decode_kernel", "decode_sum_kernel"]),
        ((1, 2, 1, 5, 40), ["forward_kernel"]),
        ((1, 2, 1, 33, 600), ["forward_kernel"]),
    ):
        names.clear()
        polynomial_attention(*operands(shape, head_dim=16, value_dim=16, dtype=torch.float32), backend="triton")
        assert names == expected


def test_tuning_writes_the_fastest_configuration_that_is_right(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_polyattn.ops.triton import tune
    from hf_polyattn.ops.triton.tuning import Configuration, read_table

    rows = tuple(Configuration(16, block, 4, 1) for block in (16, 32, 64))
    launch, times = layout.launch, {16: 3.0, 32: 2.0, 64: 1.0}
    used: list[int] = []

    def spoil(kernel: Any, programs: int, call: Any, tuned: Configuration, *arguments: Any, **static: Any) -> None:
        launch(kernel, programs, call, tuned, *arguments, **static)
        used.append(tuned.block_n)
        if tuned.block_n == 64:  # the fastest, but wrong
            arguments[3].pointer.zero_()

    monkeypatch.setattr(layout, "launch", spoil)
    path = tune.tune(
        torch.device("cpu"),
        "A device",
        dtypes=[torch.float32],
        widths=[64],
        length=16,
        tokens=16,
        candidates={"forward": rows},
        folder=tmp_path,
        measure=lambda run: (run(), times[used[-1]])[1],
        report=lambda line: None,
    )
    assert path.name == "a-device.json"
    expected = Configuration(16, 32, 4, 1)
    assert read_table(path) == {"forward": {"float32-64-monomial": expected, "float32-64": expected}}
    assert layout.configuration_of("forward", tune._call(torch.device("cpu"), torch.float32, 64, (1, 16))) != expected
