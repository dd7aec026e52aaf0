"""The fused kernel of the row shift computes what PyTorch does, of every pattern it takes, and leaves the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_cases import PATTERNS, D, H, operands
from torch import Tensor

import hf_polyattn.patching.core
from hf_polyattn import BackendError, PolyAttentionConfig
from hf_polyattn.ops.centers import LONGEST
from hf_polyattn.patching.core import PolyAttention


def shifted(row_shift: str = "moments", squares: int = 3, groups: int = 2) -> PolyAttention:
    generator = torch.Generator().manual_seed(0)
    config = PolyAttentionConfig("poly3", interval=True, row_shift=row_shift, squares=squares)
    layer = PolyAttention(config, H, D)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.endswith(("lengths", "coefficients")):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if layer.moments is not None:
            layer.moments.scales.abs_().add_(0.5)
            layer.moments.lengths.copy_(torch.tensor([3.0, 30.0]))
    return layer


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the kernel took each call."""
    took: list[bool] = []
    fused = hf_polyattn.patching.core.fused_centers

    def watched(*arguments: Any, **settings: Any) -> Tensor | None:
        found = fused(*arguments, **settings)
        took.append(found is not None)
        return found

    monkeypatch.setattr(hf_polyattn.patching.core, "fused_centers", watched)
    return took


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row_shift", ["linear", "moments"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_kernel_computes_what_pytorch_does(
    pattern: str, row_shift: str, dtype: torch.dtype, kernel_calls: list[bool]
) -> None:
    settings = dict(PATTERNS[pattern])
    query, key = operands(settings.pop("q_len", 40), settings.pop("k_len", 40), dtype)
    layer = shifted(row_shift, 3 if row_shift == "moments" else 0)
    with torch.no_grad():
        found = layer.row_centers(query, key, scaling=0.2, **settings)
    exact = layer.double().row_centers(query.double(), key.double(), scaling=0.2, **settings)
    assert kernel_calls == [True, False]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-5)


def test_every_parameter_counts_in_the_kernel() -> None:
    query, key = operands(40, 40, torch.float32)
    layer = shifted()
    with torch.no_grad():
        before = layer.row_centers(query, key, scaling=0.2, causal=True)
        assert layer.moments is not None
        for name, tensor in [*layer.moments.named_parameters(), ("center", layer.center), ("mu", layer.key_shift)]:
            kept = tensor.clone()
            tensor.mul_(1.5)
            after = layer.row_centers(query, key, scaling=0.2, causal=True)
            tensor.copy_(kept)
            assert (after - before).abs().amax((0, 2)).min() > 1e-4, name


TRAINED = ("center", "key_shift", "moments.weights", "moments.length_shift", "moments.squares")
LONGER: dict[str, dict[str, Any]] = {
    "blocks": {"q_len": 150, "k_len": 150},
    "causal blocks": {"q_len": 150, "k_len": 150, "causal": True},
}


def gradients_of(
    layer: PolyAttention, query: Tensor, key: Tensor, settings: dict[str, Any]
) -> dict[str, Tensor | None]:
    leaves = {"query": query.detach().requires_grad_(), "key": key.detach().requires_grad_()}
    centers = layer.row_centers(leaves["query"], leaves["key"], scaling=0.2, **settings)
    leaves |= {name: parameter for name, parameter in layer.named_parameters() if name in TRAINED}
    wanted = torch.randn(centers.shape, generator=torch.Generator().manual_seed(5)).to(centers.dtype)
    found = torch.autograd.grad(centers, list(leaves.values()), wanted, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("row_shift", ["linear", "moments"])
@pytest.mark.parametrize("pattern", [name for name in (*PATTERNS, *LONGER) if name != "decode"])
def test_gradients_are_those_of_pytorch(pattern: str, row_shift: str, kernel_calls: list[bool]) -> None:
    settings = dict({**PATTERNS, **LONGER}[pattern])
    query, key = operands(settings.pop("q_len", 40), settings.pop("k_len", 40), torch.float32)
    layer = shifted(row_shift, 3 if row_shift == "moments" else 0)
    found = gradients_of(layer, query, key, settings)
    exact = gradients_of(layer.double(), query.double(), key.double(), settings)
    assert kernel_calls == [True, False]
    assert sum(grad is not None for grad in exact.values()) == (7 if row_shift == "moments" else 3)
    for name, expected in exact.items():
        if expected is None:
            assert found[name] is None, name
        else:
            assert found[name].dtype == torch.float32
            assert (found[name].double() - expected).abs().max() < 5e-6 * expected.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_rounded_operands(dtype: torch.dtype, kernel_calls: list[bool]) -> None:
    query, key = operands(40, 40, dtype)
    layer = shifted()
    found = gradients_of(layer, query, key, {"causal": True})
    exact = gradients_of(layer.double(), query.double(), key.double(), {"causal": True})
    assert kernel_calls == [True, False]
    for name in exact:
        tolerance = torch.finfo(dtype).eps if name in ("query", "key") else 5e-6
        assert (found[name].double() - exact[name]).abs().max() < tolerance * exact[name].abs().max(), name
    assert found["query"].stride() == query.stride()  # heads inside of tokens, as the projection before has them


def test_second_derivatives_are_refused_by_name() -> None:
    layer, (query, key) = shifted(), operands(40, 40, torch.float32)
    centers = layer.row_centers(query.requires_grad_(), key, scaling=0.2)
    with pytest.raises(BackendError, match="first derivatives only"):
        torch.autograd.grad(centers.sum(), query, create_graph=True)


def test_what_the_kernel_leaves_to_pytorch(kernel_calls: list[bool]) -> None:
    layer, (query, key) = shifted(), operands(40, 40, torch.float32)
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    layer.row_centers(query[:, :, :1], key, scaling=0.2)  # too few rows for the kernel's gradients
    with torch.no_grad():
        layer.row_centers(query, key, scaling=0.2, mask=mask)
        layer.row_centers(query.double(), key.double(), scaling=0.2)
        layer.row_centers(*operands(LONGEST + 1, LONGEST + 1, torch.float32), scaling=0.2, causal=True)
        torch.func.vmap(lambda q: layer.row_centers(q, key, scaling=0.2))(query[None])
    assert not any(kernel_calls)
    with torch.no_grad():
        layer.row_centers(*operands(LONGEST + 1, LONGEST + 1, torch.float32), scaling=0.2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = layer.row_centers(query, key, scaling=0.2)
        expected = layer.row_centers(query.bfloat16(), key.bfloat16(), scaling=0.2)
    assert kernel_calls[-3:] == [True, True, True]
    assert torch.equal(rounded, expected)
