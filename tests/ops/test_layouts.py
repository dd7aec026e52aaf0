"""Views, rows that see nothing and empty tensors; a block of weights at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from error_budget import operands, outputs_and_gradients
from formula import DENSE, FEATURES, backends, distance, make_call, naive, normalizers, padding
from kernel_cases import (
    EMPTY,
    LAYOUTS,
    Shape,
    check_empty_tensors,
    check_layout_of_gradients,
    check_rows_that_see_nothing,
    layout_difference,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_polyattn import polynomial_attention
from hf_polyattn.ops import BACKENDS, chunked
from hf_polyattn.ops.call import Call
from hf_polyattn.spec import NORMALIZERS

pytestmark = pytest.mark.usefixtures("small_blocks")


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(backend: str, layout: str) -> None:
    assert layout_difference(backend, layout, operands()) < 1e-12


def test_gradients_lie_as_their_operands() -> None:
    check_layout_of_gradients("chunked", torch.float64)


@backends
def test_keys_expanded_over_the_batch_need_no_copy(backend: str) -> None:
    query, key, value, coefficients = (tensor.detach() for tensor in operands())
    expanded = [query, key[:1].expand(2, -1, -1, -1), value[:1].expand(2, -1, -1, -1), coefficients]
    assert distance(polynomial_attention(*expanded, backend=backend), naive(*expanded)) < 1e-12


@backends
@normalizers
@pytest.mark.parametrize("power", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_that_see_nothing_are_zero_and_harmless(
    backend: str, normalizer: str, power: int, dtype: torch.dtype
) -> None:
    check_rows_that_see_nothing(backend, normalizer, power, dtype)


@backends
@pytest.mark.parametrize(
    ("normalizer", "row"), [("rsqrt", [0.5]), ("mean", [0.25]), ("none", [1.0]), ("l1", [0.25])], ids=NORMALIZERS
)
def test_only_visible_keys_are_counted(backend: str, normalizer: str, row: list[float]) -> None:
    ones = torch.ones(1, 1, 6, 1)
    mask = torch.arange(6) < 4
    output = polynomial_attention(
        ones,
        ones,
        ones,
        torch.tensor([[1.0, 0.0]]),
        mask=mask[None, None, None],
        normalizer=normalizer,
        backend=backend,
    )
    assert torch.allclose(output, 4.0 * torch.tensor(row).expand_as(output))


@backends
@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
@normalizers
def test_empty_tensors_give_zeros(backend: str, shape: Shape, normalizer: str) -> None:
    check_empty_tensors(backend, shape, normalizer, torch.float64)


@pytest.mark.parametrize("budget", [1, 20, 56, 120, 10**6])
@pytest.mark.parametrize("feature", ["dense", "causal", "window", "causal-window", "mask-per-head"])
def test_blocks_hold_every_visible_weight_once(budget: int, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_BLOCK_WEIGHTS_CPU", budget)
    shape = (3, 6, 3, 5, 7)
    settings = {**DENSE, **FEATURES}[feature](shape)
    call = make_call(operands(shape), **settings)
    ones = torch.ones(shape[0], shape[1], shape[3], shape[4])
    visits = torch.zeros_like(ones)
    blocks = list(chunked._blocks(call))
    for block in blocks:
        weights = block.hide(ones[block.entries, block.heads, block.rows, block.columns].double())
        visits[block.entries, block.heads, block.rows, block.columns] += weights
        assert weights.numel() <= max(budget, 2 * shape[4])  # the two query heads of one group, one row

    _, visible = polynomial_attention(*operands(shape)[:3], torch.tensor([[1.0, 0.0]]), **settings, return_weights=True)
    assert torch.equal(visits, (visible > 0).float())
    assert (len(blocks) > 1) is (budget < 10**6 or "causal" in feature or "window" in feature)


class Allocations(TorchDispatchMode):
    """Records the shape of every tensor that an operation makes, those inside the fused operator included."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        *call, backend = args
        with self:
            if func is torch.ops.polyattn.attention.default:
                return BACKENDS[backend].load().forward(Call(*call))
            if func is torch.ops.polyattn.attention_backward.default:
                grad_output, output, row_scale, coefficients_grad, center_grad, *call = call
                return BACKENDS[backend].load().backward(
                    grad_output, output, row_scale, Call(*call),
                    coefficients_grad=coefficients_grad, center_grad=center_grad,
                )  # fmt: skip
        outputs = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        for output, spec in zip(outputs if len(returns) > 1 else [outputs], returns, strict=True):
            if isinstance(output, Tensor) and spec.alias_info is None:
                self.shapes.append(output.shape)
        return outputs


def allocations(tensors: list[Tensor], **settings: Any) -> list[torch.Size]:
    with Allocations() as record:
        outputs_and_gradients(tensors, **settings)
    return record.shapes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"causal": True, "normalizer": "l1", "power": 4, "clamp": True},
        {"mask": padding((1, 2, 1, 2048, 2048), rows=2048), "dropout": 0.1},
    ],
    ids=["dense", "causal-l1", "mask-dropout"],
)
def test_chunked_allocates_no_more_than_a_block(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    budget = 2**17
    monkeypatch.setattr(chunked, "_BLOCK_WEIGHTS_CPU", budget)
    monkeypatch.setattr(chunked, "_BAND_ROWS", 128)
    tensors = operands((1, 2, 1, 2048, 2048), head_dim=16, value_dim=16, dtype=torch.float32)
    largest = max(shape.numel() for shape in allocations(tensors, **settings, backend="chunked"))
    assert budget // 2 < largest <= budget


def test_reference_allocates_all_weights() -> None:
    """The control of the test above."""
    tensors = operands((1, 2, 1, 256, 256), dtype=torch.float32)
    assert max(shape.numel() for shape in allocations(tensors, backend="reference")) == 2 * 256 * 256


@backends
def test_keys_are_never_expanded_to_the_query_heads(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_BLOCK_WEIGHTS_CPU", 10**6)
    batch, heads, groups, q_len, k_len, head_dim = 2, 6, 2, 5, 11, 4
    tensors = operands((batch, heads, groups, q_len, k_len), head_dim=head_dim, value_dim=head_dim)

    def largest_key(tensors: list[Tensor]) -> int:
        shapes = allocations(tensors, backend=backend)
        return max(shape.numel() for shape in shapes if sorted(shape[-2:]) == [head_dim, k_len])

    assert largest_key(tensors) == batch * groups * k_len * head_dim
    expanded = [tensors[0], *(tensor.repeat_interleave(3, 1) for tensor in tensors[1:3]), tensors[3]]
    assert largest_key(expanded) == batch * heads * k_len * head_dim
