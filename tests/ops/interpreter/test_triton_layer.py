"""A whole attention module, with its row shift and its refinements, by the Triton kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from layer_cases import PATTERNS, TOLERANCES, B, inputs, module, watched
from layer_cases import error_of as error_of_entries

from hf_polyattn.ops.triton import launch, layout
from hf_polyattn.ops.triton import layer as kernels

error_of = partial(error_of_entries, entries=2)  # the second one's ranges are empty

MASK = torch.rand(B, 1, 40, 40, generator=torch.Generator().manual_seed(4)) > 0.3
MASK[1, :, 5] = False  # a row that sees nothing
CALLS: dict[str, dict[str, Any]] = {
    **{name: PATTERNS[name] for name in ("all", "padding", "ranges by row", "causal", "window", "decode")},
    "mask": {"mask": MASK},
    "decode with a mask": {"q_len": 2, "k_len": 40, "mask": MASK[:, :, :2]},
    "decode of ranges": {"q_len": 1, "k_len": 70, "ranges": PATTERNS["padding"]["ranges"]},
}


SPECS = {"poly3": CALLS, "poly4~2-l1": ("causal", "mask", "decode"), "poly3^4~1-mean": ("window", "decode of ranges")}


@pytest.mark.parametrize(("spec", "call"), [(spec, call) for spec, calls in SPECS.items() for call in calls])
def test_the_kernels_compute_what_pytorch_does(spec: str, call: str) -> None:
    assert error_of(module(spec), CALLS[call], torch.float32) < TOLERANCES[torch.float32]


@pytest.mark.parametrize(("spec", "call"), [("poly3", "decode"), ("poly6-l1", "causal"), ("poly3~1-none", "mask")])
def test_the_linear_shift_alone(spec: str, call: str) -> None:
    assert error_of(module(spec, "linear"), CALLS[call], torch.float32) < TOLERANCES[torch.float32]


def test_rounded_operands() -> None:
    for call in ("causal", "decode"):
        assert error_of(module("poly3~1"), CALLS[call], torch.float16) < TOLERANCES[torch.float16], call


@pytest.mark.parametrize("clamp", [True, False])
def test_a_clamp_holds_the_polynomial_and_its_refinements(clamp: bool) -> None:
    for call in ("all", "decode"):
        layer = module("poly3~1", clamp=clamp)
        assert error_of(layer, CALLS[call], torch.float32, scaling=1.0) < 1e-4, call


def test_moments_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LONGEST_LOOK", 0)
    given: list[bool] = []
    forward = launch.forward

    def record(call: Any, shift: Any) -> Any:
        given.append(shift.mean is not None)
        return forward(call, shift)

    monkeypatch.setattr(launch, "forward", record)
    for call in ("padding", "causal", "window", "mask"):
        assert error_of(module("poly3"), CALLS[call], torch.float32) < 1e-5, call
    assert given == [True, True, False, False]


def test_decoding_reads_keys_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    usual = layout.launch

    def record(kernel: Any, programs: int, call: Any, tuned: Any, *arguments: Any, **static: Any) -> None:
        reads_keys = any(getattr(argument, "pointer", None) is call.key for argument in arguments)
        names.append(kernel.__name__.removesuffix("_kernel") + " reads keys" * reads_keys)
        usual(kernel, programs, call, tuned, *arguments, **static)

    monkeypatch.setattr(layout, "launch", record)
    with torch.no_grad():
        module("poly3~1")(*inputs({"q_len": 1}, torch.float32), scaling=0.2)
    assert names == ["products reads keys", "predict", "row_sum", "step", "decode", "decode_sum"]


def test_dropout_drops_what_other_backends_drop() -> None:
    layer = module("poly3")
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        tensors = [tensor.to(dtype) for tensor in inputs({}, torch.float32)]
        with torch.no_grad():
            found.append(layer.to(dtype)(*tensors, scaling=0.2, dropout=0.4).double())
    assert (found[0] - found[1]).abs().max() / found[1].abs().max() < 1e-5


def test_gradients_are_left_to_pytorch() -> None:
    with watched() as took:
        module("poly3")(*(tensor.requires_grad_() for tensor in inputs({}, torch.float32)), scaling=0.2)
    assert took == [False]
