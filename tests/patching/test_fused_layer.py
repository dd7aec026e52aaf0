"""One kernel computes a whole attention module as PyTorch does in float64, and leaves what it cannot to PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from layer_cases import PATTERNS, TOLERANCES, D, H, inputs, module, ranges_of, vars_of, watched
from torch.nn.utils import parametrize

from hf_polyattn import PolyAttentionConfig
from hf_polyattn.ops.layer import _KEPT
from hf_polyattn.ops.module import MOMENTS, POLYNOMIAL, REFINEMENT
from hf_polyattn.patching.core import PolyAttention

SPECS = ("poly3", "poly6-l1", "poly3^4-mean", "poly3~1", "poly4~2-l1", "poly3~1-none")
LONG: dict[str, dict[str, Any]] = {
    "several tiles": {"q_len": 300, "k_len": 300, "causal": True},
    "more keys than are kept": {"q_len": 20, "k_len": _KEPT + 30},
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("row_shift", ["none", "linear", "moments"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_kernel_computes_what_pytorch_does(spec: str, row_shift: str, dtype: torch.dtype) -> None:
    layer = module(spec, row_shift)
    patterns = {**PATTERNS, **LONG} if row_shift == "moments" else PATTERNS
    for name, pattern in patterns.items():
        settings = dict(pattern)
        query, key, value = inputs(settings, dtype)
        with watched() as took, torch.no_grad():
            found = layer.float()(query, key, value, scaling=0.2, **settings)
        exact = layer.double()(query.double(), key.double(), value.double(), scaling=0.2, **settings)
        assert took == [True], name
        assert found.dtype == dtype
        assert found.is_contiguous()
        error = (found.double() - exact).abs().max() / exact.abs().max()
        assert error < TOLERANCES[dtype], name


@pytest.mark.parametrize("clamp", [True, False])
def test_a_clamp_holds_the_polynomial_and_its_refinements(clamp: bool) -> None:
    layer, (query, key, value) = module("poly3~1", clamp=clamp), inputs({}, torch.float32)
    with torch.no_grad():
        found = layer(query, key, value, scaling=2.0)
    exact = layer.double()(query.double(), key.double(), value.double(), scaling=2.0)
    assert (found.double() - exact).abs().max() / exact.abs().max() < 1e-5
    layer.configure(PolyAttentionConfig(**{**vars_of(layer), "clamp": not clamp}))
    other = layer.double()(query.double(), key.double(), value.double(), scaling=2.0)
    assert (found.double() - other).abs().max() / exact.abs().max() > 0.1


def test_every_tensor_counts() -> None:
    layer, (query, key, value) = module("poly3~1"), inputs({}, torch.float32)
    assert layer.moments is not None
    assert layer.refinements is not None
    named = {name: getattr(layer, name) for name in (*POLYNOMIAL, "key_shift")}
    named |= {f"moments.{name}": getattr(layer.moments, name) for name in MOMENTS}
    named |= {f"refinement.{name}": getattr(layer.refinements[0], name) for name in REFINEMENT}
    assert {id(tensor) for tensor in named.values()} == {id(parameter) for parameter in layer.parameters()}
    with torch.no_grad():
        before = layer(query, key, value, scaling=0.2, causal=True)
        for name, tensor in named.items():
            kept = tensor.clone()
            tensor.mul_(1.5)
            after = layer(query, key, value, scaling=0.2, causal=True)
            tensor.copy_(kept)
            assert (after - before).abs().amax((0, 1, 3)).min() > 1e-5, name


def test_one_polynomial_for_all_heads_and_no_interval() -> None:
    layer = PolyAttention(PolyAttentionConfig("poly3", granularity="layer"), H, D)
    query, key, value = inputs({}, torch.float32)
    with torch.no_grad(), watched() as took:
        layer.delta.copy_(torch.randn(layer.delta.shape))
        layer.center.fill_(1.0)  # counts for nothing
        found = layer(query, key, value, causal=True)
    exact = layer.double()(query.double(), key.double(), value.double(), causal=True)
    assert took == [True]
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def test_a_monomial_is_one_only_while_it_is() -> None:
    layer, (query, key, value) = PolyAttention(PolyAttentionConfig("poly3"), H, D), inputs({}, torch.float32)
    for change in (0.0, 0.1):
        layer.float().coefficients.data[0, 1] = change
        with torch.no_grad():
            found = layer(query, key, value)
        exact = layer.double()(query.double(), key.double(), value.double())
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def test_few_rows_are_decoded_over_all_parts_of_the_keys() -> None:
    for q_len, k_len, settings in (
        (1, 1300, {}),
        (3, 530, {"causal": True}),
        (2, 1300, {"ranges": ranges_of(2, 1300)}),
    ):
        query, key, value = inputs({"q_len": q_len, "k_len": k_len}, torch.float32)
        for spec in ("poly3~1", "poly4~1-l1"):
            layer = module(spec)
            with watched() as took, torch.no_grad():
                found = layer(query, key, value, scaling=0.2, **settings)
            exact = layer.double()(query.double(), key.double(), value.double(), scaling=0.2, **settings)
            assert took == [True]
            assert (found.double() - exact).abs().max() / exact.abs().max() < 1e-5


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_lesser_machines_compute_the_same(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    environment["ONEDNN_MAX_CPU_ISA"] = {"avx2": "AVX2", "default": "SSE41"}[capability]
    chosen = "every_tensor_counts or decoded_over or (what_pytorch_does and poly4 and moments)"
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "5 passed" in done.stdout


def test_a_mask_goes_with_rows_that_are_not_moved_by_their_scores() -> None:
    for q_len, k_len in ((40, 40), (2, 600), (20, _KEPT + 30)):
        query, key, value = inputs({"q_len": q_len, "k_len": k_len}, torch.float32)
        mask = torch.rand(1, H, q_len, k_len, generator=torch.Generator().manual_seed(4)) < 0.7
        expected = {("poly3", "none"): True, ("poly6-l1", "linear"): True, ("poly3", "moments"): False}
        expected[("poly3~1", "linear")] = False
        for (spec, row_shift), takes in expected.items():
            layer = module(spec, row_shift)
            with torch.no_grad(), watched() as took:
                found = layer(query, key, value, mask=mask)
            exact = layer.double()(query.double(), key.double(), value.double(), mask=mask)
            assert took == [takes]
            torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def test_what_the_kernel_leaves_to_pytorch() -> None:
    layer, (query, key, value) = module("poly3"), inputs({}, torch.float32)
    with watched() as took, torch.no_grad():
        layer(query.double(), key.double(), value.double())
        long = [torch.randn(1, heads, _KEPT + 1, D) for heads in (H, H, H)]
        layer(*long, causal=True)
        torch.func.vmap(lambda q: layer(q, key, value))(query[None])
        layer(query, key, value, return_weights=True)
    assert not any(took)

    with torch.no_grad(), watched() as took:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = layer(query, key, value)
        expected = layer(query.bfloat16(), key.bfloat16(), value.bfloat16())
        assert took == [True, True]
        assert torch.equal(rounded, expected)
        doubled = torch.nn.Module()
        doubled.forward = lambda tensor: 2.0 * tensor  # type: ignore[method-assign, assignment]
        before = layer(query, key, value)
        parametrize.register_parametrization(layer, "center", doubled)
        assert not torch.equal(layer(query, key, value), before)


def test_empty_inputs_and_wrong_ones() -> None:
    layer = module("poly3")
    with torch.no_grad():
        none = torch.zeros(2, 2, 0, D)
        assert layer(torch.randn(2, H, 3, D), none, none).abs().sum() == 0.0
        with pytest.raises(ValueError, match="do not fit"):
            layer(torch.randn(2, H, 3, D), torch.randn(2, H, 3, D + 1), torch.randn(2, H, 3, D))
        with pytest.raises(ValueError, match=r"ranges .* do not fit"):
            layer(*(torch.randn(2, H, 3, D) for _ in range(3)), ranges=torch.zeros(5, 1, 2, dtype=torch.int32))


def test_the_kernel_is_the_same_on_any_number_of_threads() -> None:
    layer, (query, key, value) = module("poly3~1"), inputs({"q_len": 200, "k_len": 200}, torch.float32)
    threads, found = torch.get_num_threads(), []
    with torch.no_grad():
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(layer(query, key, value, causal=True))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
