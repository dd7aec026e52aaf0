"""What is recorded of a patched model, by export, trace or fake tensors, holds for other batches and lengths."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from in_double import all_four, as_double, output, same
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import hf_polyattn as hp
from hf_polyattn import polynomial_attention

DYNAMIC = {
    "auto": {"batch": Dim.AUTO, "length": Dim.AUTO},
    "named": {"batch": Dim("batch"), "length": Dim("length", min=2, max=512)},
    "batch only": {"batch": Dim("batch"), "length": None},
}


@pytest.fixture(scope="module", autouse=True)
def _silence() -> Iterator[None]:
    logging.disable(logging.ERROR)  # pytest keeps every record of torch's tracing, and formatting them takes longer
    yield
    logging.disable(logging.NOTSET)


def model_inputs(model: Any, batch: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Random inputs for a model in float64; the last three tokens of the first row are padding."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 3, 224, 224, generator=generator, dtype=torch.float64)}
    ids = torch.randint(3, 50, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length - 3 :] = 0
    extra = {"use_cache": False} if hasattr(model, "lm_head") else {}
    return {"input_ids": ids, "attention_mask": mask, **extra}


def axes(inputs: dict[str, Any], batch: Any, length: Any) -> dict[str, Any]:
    sizes = {0: batch} if "pixel_values" in inputs or length is None else {0: batch, 1: length}
    return {name: sizes if isinstance(value, Tensor) else None for name, value in inputs.items()}


@all_four
@pytest.mark.parametrize("dynamic", DYNAMIC)
def test_one_exported_program_runs_every_batch_and_length(name: str, dynamic: str, double: Any) -> None:
    model = double(name, layers=2)
    example, heads = model_inputs(model, 2, 9), model.config.num_attention_heads
    program = torch.export.export(model, (), kwargs=example, dynamic_shapes=axes(example, **DYNAMIC[dynamic])).module()
    sizes = [(1, 9), (heads, 9), (5, 9)]
    if dynamic != "batch only":
        sizes += [(3, 17), (heads, heads)]
    for batch, length in sizes if name != "vit" else sizes[:2]:
        inputs = model_inputs(model, batch, length, seed=1)
        expected = output(model, **inputs)
        assert same(name, output(program, **inputs), expected)
        with hp.softmax_attention(model):
            assert not same(name, output(model, **inputs), expected)


class FirstOutput(nn.Module):
    """A model as tracers take it: tensors in, one tensor out."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> Tensor:
        result: Tensor = self.model(**{**self.inputs, **dict(zip(self.inputs, tensors, strict=False))})[0]
        return result


@all_four
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("spec", ["poly3", "poly6-l1"])
def test_a_trace_passes_its_own_check_and_is_plain_aten(name: str, trained: bool, spec: str, double: Any) -> None:
    model = double(name, hp.PolyAttentionConfig(spec, learnable=trained), layers=1)
    module = FirstOutput(model, model_inputs(model, 2, 9))
    example, other = (list(model_inputs(model, *shape).values())[:2] for shape in ((2, 9), (4, 13)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, tuple(example))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert any(kind.startswith("aten::matmul") for kind in kinds)
    assert not any("polyattn" in kind for kind in kinds)
    for inputs in (example, other):
        with torch.no_grad():
            assert same(name, traced(*inputs), module(*inputs))
    with torch.no_grad(), hp.softmax_attention(model):
        assert not same(name, traced(*other), module(*other))


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@all_four
def test_fake_tensors_go_through(name: str, padded: bool, double: Any) -> None:
    model = double(name, layers=1)
    inputs = model_inputs(model, 2, 9)
    if not padded:
        inputs.pop("attention_mask", None)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {key: mode.from_tensor(value) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        assert output(model, **fake).shape == output(model, **inputs).shape


def test_meta_tensors_and_make_fx_go_through_where_softmax_does(double: Any) -> None:
    model = double("minilm", layers=1)
    ids, others = (model_inputs(model, 2, 9, seed)["input_ids"] for seed in (0, 1))
    expected = output(model, input_ids=others)
    assert output(copy.deepcopy(model).to("meta"), input_ids=ids.to("meta")).shape == expected.shape
    graph = make_fx(FirstOutput(model, {"input_ids": ids}))(ids)
    with torch.no_grad():
        assert same("minilm", graph(others), expected)


def test_a_frozen_bare_polynomial_keeps_its_tangents(double: Any) -> None:
    """Kernels skip coefficients that are 0 and frozen, but not the derivatives that somebody asks for all the same."""
    model = double("minilm", hp.PolyAttentionConfig("poly3", learnable=False), layers=1)
    for module in model.modules():
        if isinstance(module, hp.patching.core.PolyAttention):
            module.reset_parameters()
    inputs = as_double(model_inputs(model, 2, 9))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tangents = {
        name: torch.ones_like(weight) if name.endswith("coefficients") else torch.zeros_like(weight)
        for name, weight in weights.items()
    }

    def run(weights: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(model, weights, (), inputs)[0]
        return found

    step = 1e-4
    ahead, behind = (
        run({name: weight + sign * step * tangents[name].double() for name, weight in weights.items()})
        for sign in (1, -1)
    )
    numeric = (ahead - behind) / (2 * step)
    assert float(numeric.abs().max()) > 1e-3
    found = torch.func.jvp(run, (weights,), (tangents,))[1]
    torch.testing.assert_close(found, numeric, rtol=1e-5, atol=1e-6 * float(numeric.abs().max()))
    with torch.autograd.forward_ad.dual_level():
        dual = {
            name: torch.autograd.forward_ad.make_dual(weight, tangents[name]) if tangents[name].any() else weight
            for name, weight in weights.items()
        }
        found = torch.autograd.forward_ad.unpack_dual(run(dual)).tangent
    torch.testing.assert_close(found, numeric, rtol=1e-5, atol=1e-6 * float(numeric.abs().max()))


@pytest.mark.parametrize("batch", [4, 1], ids=["batch is heads", "batch of one"])
def test_a_center_is_told_by_its_dimensions(batch: int) -> None:
    query, key, value = torch.randn(3, batch, 4, 4, 8, dtype=torch.float64).unbind()
    coefficients = torch.randn(4, 4, dtype=torch.float64)
    center = torch.randn(4, dtype=torch.float64)
    per_head = polynomial_attention(query, key, value, coefficients, center=center)
    per_row = polynomial_attention(
        query, key, value, coefficients, center=center[None, :, None].expand(batch, 4, 4).contiguous()
    )
    torch.testing.assert_close(per_head, per_row)
    with pytest.raises(hp.errors.InputError, match=r"center must be a float, \(H,\)"):
        polynomial_attention(query, key, value, coefficients, center=center[None])
