"""A module's gradients by one kernel: within the error budget of those in float64, and what is left to PyTorch."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from budget import excess
from layer_cases import PATTERNS, D, H, inputs, module, watched
from test_fused_layer import LONG
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hf_polyattn.patching.core
from hf_polyattn import BackendError, InputError, PolyAttentionConfig
from hf_polyattn.ops.layer import _KEPT
from hf_polyattn.patching.core import PolyAttention

SPECS = ("poly3", "poly6-l1", "poly3^4-mean")
TRAINED = {"none": {"delta", "center"}, "linear": {"delta", "center", "key_shift"}}
TRAINED["moments"] = {*TRAINED["linear"], "moments.weights", "moments.length_shift", "moments.squares"}


def found_by(
    layer: PolyAttention, tensors: tuple[Tensor, ...], settings: dict[str, Any], seed: int = 0
) -> dict[str, Tensor | None]:
    """The output, and the gradients of query, key, value and parameters for a fixed gradient of it."""
    leaves = dict(zip(("query", "key", "value"), (tensor.detach().requires_grad_() for tensor in tensors), strict=True))
    torch.manual_seed(seed)  # of dropout
    output = layer(*leaves.values(), scaling=0.2, **settings)
    leaves |= {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    wanted = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output)
    grads = torch.autograd.grad(output, list(leaves.values()), wanted, allow_unused=True)
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def by_pytorch(layer: PolyAttention, *arguments: Any) -> dict[str, Tensor | None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_polyattn.patching.core, "fused_layer", lambda *args, **kwargs: None)
        patch.setattr(hf_polyattn.patching.core, "fused_centers", lambda *args, **kwargs: None)
        return found_by(layer, *arguments)


def error_of(spec: str, row_shift: str, dtype: torch.dtype, patterns: dict[str, Any]) -> dict[str, float]:
    """The error of the output and of every gradient over its budget, of all patterns and some draws together."""
    results: dict[str, list[list[Tensor]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    draws = 3 if dtype == torch.float32 else 1  # more, where errors are few units in the last place
    for pattern, seed in itertools.product(patterns.values(), range(draws)):
        settings, layer = dict(pattern), module(spec, row_shift)
        tensors = inputs(settings, dtype)
        with watched() as took:
            found = found_by(layer.float(), tensors, settings, seed)
        assert took == [True]
        assert found["output"].dtype == dtype
        same = by_pytorch(layer, tensors, settings, seed)
        exact = found_by(layer.double(), tuple(tensor.double() for tensor in tensors), settings, seed)
        for name, grad in exact.items():
            # numbers of a head are sums over all rows, which may cancel: their size is that in all patterns
            size, dtypes[name] = grad.abs().max() if grad.dim() == 4 else 1.0, found[name].dtype
            parts = results.setdefault(name, [[], [], []])
            for part, tensor in zip(parts, (found[name], same[name], grad), strict=True):
                part.append((tensor.double() / size).flatten())
    return {name: excess(*(torch.cat(part) for part in parts), dtypes[name]) for name, parts in results.items()}


@pytest.mark.parametrize("row_shift", TRAINED)
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [*((spec, torch.float32) for spec in SPECS), *((spec, torch.bfloat16) for spec in SPECS), ("poly3", torch.float16)],
    ids=str,
)
def test_gradients_are_within_the_error_budget(spec: str, row_shift: str, dtype: torch.dtype) -> None:
    patterns = {**PATTERNS, **LONG, "dropout": {"dropout": 0.2}}
    if row_shift != "moments":
        patterns["mask"] = {"mask": torch.rand(1, H, 40, 40, generator=torch.Generator().manual_seed(4)) < 0.7}
    errors = error_of(spec, row_shift, dtype, patterns)
    assert {*errors} == {"output", "query", "key", "value"} | TRAINED[row_shift]
    assert max(errors.values()) <= 1.0, errors


@pytest.mark.parametrize("wrong", ["radius", "moments.means", "moments.scales", "directions", "key_shift"])
def test_the_error_budget_notices_a_tensor_that_backward_reads_wrongly(wrong: str) -> None:
    layer, tensors = module("poly3"), inputs({}, torch.float32)
    same, exact = by_pytorch(layer, tensors, {}), by_pytorch(layer.double(), [t.double() for t in tensors], {})
    parameters = dict(layer.float().named_parameters())
    with torch.no_grad():
        parameters[wrong].mul_(1.01)
    found = found_by(layer, tensors, {})
    assert max(excess(found[name], same[name], exact[name]) for name in exact) > 10.0


def test_one_polynomial_for_all_heads_sums_their_gradients() -> None:
    layer = PolyAttention(PolyAttentionConfig("poly3", granularity="layer"), H, D)
    tensors = inputs({}, torch.float32)
    with watched() as took:
        found = found_by(layer, tensors, {"causal": True})
    exact = by_pytorch(layer.double(), tuple(tensor.double() for tensor in tensors), {"causal": True})
    assert took == [True]
    assert {*found} == {"output", "query", "key", "value", "delta"}
    assert (found["delta"] != 0.0).all()  # of the coefficients that are 0 too
    for name, grad in exact.items():
        torch.testing.assert_close(found[name].double(), grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


def test_a_frozen_polynomial_still_moves_queries_and_keys() -> None:
    for spec in ("poly3", "poly6-l1"):
        layer, tensors = module(spec), inputs({}, torch.float32)
        trained = found_by(layer, tensors, {})
        layer.requires_grad_(False)
        with watched() as took:
            frozen = found_by(layer, tensors, {})
        assert took == [True]
        assert {*frozen} == {"output", "query", "key", "value"}
        assert all(torch.equal(grad, trained[name]) for name, grad in frozen.items())
        for tensor in (layer.moments.squares, layer.moments.means, layer.radius):
            tensor.requires_grad_()
        found = found_by(layer, tensors, {})
        assert torch.equal(found["moments.squares"], trained["moments.squares"])
        assert found["moments.means"] is found["radius"] is None


def test_a_center_that_counts_for_nothing_gets_no_gradient() -> None:
    layer, tensors = PolyAttention(PolyAttentionConfig("poly3"), H, D), inputs({}, torch.float32)
    layer.center.requires_grad_()
    with watched() as took:
        assert found_by(layer, tensors, {})["center"] is None
    assert took == [True]


def test_gradients_lie_in_memory_as_their_operands_do() -> None:
    tensors = inputs({}, torch.bfloat16)
    found = found_by(module("poly3"), tensors, {})
    for name, tensor in zip(("query", "key"), tensors, strict=False):
        assert found[name].stride() == tensor.stride() != tensor.contiguous().stride()
    assert all(found[name].is_contiguous() for name in TRAINED["moments"])


def test_autocast_casts_as_it_does_in_inference() -> None:
    layer, tensors = module("poly3"), inputs({}, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = found_by(layer, tensors, {})
        with torch.no_grad():
            assert torch.equal(layer(*tensors, scaling=0.2), rounded["output"])
    expected = found_by(layer, tuple(tensor.bfloat16() for tensor in tensors), {})
    for name, grad in expected.items():
        assert torch.equal(rounded[name].to(grad.dtype), grad), name
    assert rounded["query"].dtype == torch.float32


def test_dropout_is_that_of_the_operator_and_of_the_backward_pass() -> None:
    for q_len in (40, 2):
        layer, tensors = module("poly6-l1"), inputs({"q_len": q_len}, torch.float32)
        dropped, kept = (found_by(layer, tensors, {"dropout": p}) for p in (0.5, 0.0))
        same = by_pytorch(layer, tensors, {"dropout": 0.5})
        for name, grad in same.items():
            assert (dropped[name] - grad).abs().max() < 1e-4 * grad.abs().max(), name
            assert (dropped[name] - kept[name]).abs().max() > 1e-2 * grad.abs().max(), name
    with pytest.raises(InputError, match="dropout must be a probability"):
        layer(*tensors, dropout=1.0)


def test_gradients_are_the_same_on_any_number_of_threads() -> None:
    layer, threads = module("poly6-l1"), torch.get_num_threads()
    tensors = tuple(tensor[:1] for tensor in inputs({"q_len": 200, "k_len": 200}, torch.float32))
    found = []
    for count in (1, 1, 3):  # with three the chunks differ, and with them the order of sums
        torch.set_num_threads(count)
        found.append(found_by(layer, tensors, {"causal": True}))
    torch.set_num_threads(threads)
    for name, grad in found[0].items():
        assert torch.equal(found[1][name], grad), name
        assert (found[2][name] - grad).abs().max() < 1e-5 * grad.abs().max(), name


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    layer, tensors = module("poly3"), inputs({}, torch.float32)
    expected = found_by(layer, tensors, {"dropout": 0.2})

    class Recomputed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def named_parameters(self, *arguments: Any, **settings: Any) -> Any:
            return self.layer.named_parameters(*arguments, **settings)

        def forward(self, *arguments: Tensor, **settings: Any) -> Tensor:
            return checkpoint(self.layer, *arguments, use_reentrant=False, **settings)  # type: ignore[no-any-return]

    with watched() as took:
        found = found_by(Recomputed(), tensors, {"dropout": 0.2})  # type: ignore[arg-type]
    assert took == [True]  # the second call ends where its tensors are saved
    assert all(torch.equal(grad, expected[name]) for name, grad in found.items())


def test_second_derivatives_are_refused_by_name() -> None:
    for row_shift in TRAINED:
        query, key, value = inputs({}, torch.float32)
        output = module("poly3", row_shift)(query.requires_grad_(), key, value)
        with pytest.raises(BackendError, match="first derivatives only"):
            torch.autograd.grad(output.sum(), query, create_graph=True)


def test_what_training_leaves_to_pytorch() -> None:
    query, key, value = inputs({}, torch.float32)
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    with watched() as took:
        module("poly3~1")(query, key, value)
        module("poly3")(query, key, value, mask=mask)
        module("poly3")(query.double(), key.double(), value.double())
        module("poly3")(*(torch.randn(1, H, _KEPT + 1, D) for _ in range(3)), causal=True)
        module("poly3")(query[:, :, :0], key, value)
        layer = module("poly3").requires_grad_(True)  # what a model's does: `forward` takes it back
        layer(query, key, value)
        torch.func.grad(lambda q: layer(q, key, value).sum())(query)
    assert not any(took)
    assert not layer.coefficients.requires_grad
    with watched() as took:
        layer(query, key, value)
        module("poly3", "linear")(query, key, value, mask=mask)
    assert took == [True, True]


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_lesser_machines_compute_the_same(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    environment["ONEDNN_MAX_CPU_ISA"] = {"avx2": "AVX2", "default": "SSE41"}[capability]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    command += ["-k", "within_the_error_budget and l1 and moments and bfloat16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "1 passed" in done.stdout
