"""What holds of the operator for every shape, mask and spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from error_budget import operands, outputs_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_polyattn import Polynomial, polynomial_attention
from hf_polyattn.ops import chunked
from hf_polyattn.spec import NORMALIZERS, POWERS

deterministic = settings(derandomize=True, deadline=None, max_examples=60, database=None)


@dataclass(frozen=True, repr=False)
class Case:
    """One call: tensors in the order of the operator's signature, and its keyword arguments."""

    tensors: list[Tensor]
    arguments: dict[str, Any]
    shape: tuple[int, int, int, int, int]

    def __call__(self, **changes: Any) -> Tensor:
        return polynomial_attention(*self.tensors, **{**self.arguments, **changes}).detach()

    def with_keys(self, keys: Any) -> Case:
        """The same call with the keys, values and mask columns that the index selects."""
        query, key, value, coefficients = (tensor.detach() for tensor in self.tensors)
        arguments = {**self.arguments, "mask": self.arguments["mask"][..., keys]}
        return Case([query, key[:, :, keys], value[:, :, keys], coefficients], arguments, self.shape)

    def __repr__(self) -> str:
        return f"Case(shape={self.shape}, arguments={self.arguments})"


@st.composite
def cases(draw: st.DrawFn, *, positional: bool = True, normalizers: tuple[str, ...] = NORMALIZERS) -> Case:
    """Calls with a mask of their own; `positional` allows causal and windowed ones."""
    groups = draw(st.integers(1, 3))
    batch, heads = draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    q_len, k_len = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shape = (batch, heads, groups, q_len, k_len)
    spec = Polynomial(
        draw(st.sampled_from(("poly", "taylor"))),
        draw(st.integers(1, 8)),
        draw(st.sampled_from(POWERS)),
        draw(st.sampled_from(normalizers)),
    )
    seed = draw(st.integers(0, 2**16))
    tensors = operands(
        shape, head_dim=draw(st.integers(1, 5)), value_dim=draw(st.integers(1, 5)), degree=spec.degree, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    # p stays away from 0, and |t| within 1 for high powers, which would lose the digits that are compared.
    initial = torch.tensor(spec.initial_coefficients(), dtype=torch.float64)
    tensors[3] = (0.1 * initial * noise(heads, spec.degree + 1) + initial).detach()
    tensors[3][:, 0] += 2.0 if spec.family == "poly" else 1.0
    arguments: dict[str, Any] = {
        "mask": torch.rand(*(draw(st.sampled_from((1, size))) for size in (batch, heads, q_len)), k_len,
                           generator=generator) < 0.7,
        "center": draw(st.sampled_from((0.5, noise(heads), noise(batch, heads, q_len)))),
        "radius": draw(st.sampled_from((2.0, noise(heads).abs() + 1.0))),
        "clamp": spec.power > 4 or draw(st.booleans()),
        "power": spec.power,
        "normalizer": spec.normalizer,
        "backend": draw(st.sampled_from(("chunked", "reference"))),
    }  # fmt: skip
    if positional:
        arguments["causal"] = draw(st.booleans())
        arguments["window"] = draw(st.none() | st.integers(1, 9))
    return Case([tensor.requires_grad_() for tensor in tensors], arguments, shape)


def assert_equal(one: Tensor, other: Tensor, scale: Tensor | None = None) -> None:
    """Asserts that two tensors differ by rounding only, relative to the scale or else to the largest value."""
    assert one.shape == other.shape
    scale = other.abs().max() if scale is None else scale
    assert bool(((one - other).abs() <= 1e-10 * scale).all())


@deterministic
@given(case=cases(), budget=st.integers(1, 200), band_rows=st.integers(1, 4))
def test_chunked_equals_the_reference(case: Case, budget: int, band_rows: int) -> None:
    with (
        mock.patch.object(chunked, "_BLOCK_WEIGHTS_CPU", budget),
        mock.patch.object(chunked, "_BAND_ROWS", band_rows),
    ):
        results = outputs_and_gradients(case.tensors, **{**case.arguments, "backend": "chunked"})
    expected = outputs_and_gradients(case.tensors, **{**case.arguments, "backend": "reference"})
    scale = torch.stack([tensor.abs().max() for tensor in expected.values()]).max()
    for name, result in results.items():
        assert_equal(result, expected[name], scale)


@deterministic
@given(case=cases(positional=False), seed=st.integers(0, 2**16))
def test_the_order_of_keys_does_not_matter(case: Case, seed: int) -> None:
    order = torch.randperm(case.shape[4], generator=torch.Generator().manual_seed(seed))
    assert_equal(case.with_keys(order)(), case())


@deterministic
@given(case=cases())
def test_hidden_keys_have_no_influence(case: Case) -> None:
    hidden = ~case.arguments["mask"].expand(*case.shape[:2], case.shape[3], -1).any(dim=2)
    groups = case.shape[2]
    hidden = hidden.unflatten(1, (groups, -1)).all(dim=2)[..., None]  # from every query head of the group
    query, key, value, coefficients = (tensor.detach() for tensor in case.tensors)
    garbage = Case(
        [query, key.masked_fill(hidden, 1e30), value.masked_fill(hidden, -1e30), coefficients],
        case.arguments,
        case.shape,
    )
    assert_equal(garbage(), case())


@deterministic
@given(case=cases(), count=st.integers(1, 5))
def test_hidden_keys_on_the_right_change_nothing(case: Case, count: int) -> None:
    query, key, value, coefficients = (tensor.detach() for tensor in case.tensors)
    padded = torch.nn.functional.pad
    arguments = {**case.arguments, "mask": padded(case.arguments["mask"], (0, count))}
    longer = [query, *(padded(tensor, (0, 0, 0, count), value=9.0) for tensor in (key, value)), coefficients]
    assert_equal(Case(longer, arguments, case.shape)(), case())


@deterministic
@given(case=cases(positional=False, normalizers=("none",)), data=st.data())
def test_parts_of_the_keys_add_up(case: Case, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, case.shape[4]))
    assert_equal(case.with_keys(slice(None, cut))() + case.with_keys(slice(cut, None))(), case())


@deterministic
@given(case=cases(), scale=st.floats(0.1, 10.0))
def test_l1_does_not_see_the_scale_of_the_coefficients(case: Case, scale: float) -> None:
    query, key, value, coefficients = (tensor.detach() for tensor in case.tensors)
    scaled = Case([query, key, value, scale * coefficients], case.arguments, case.shape)
    assert_equal(scaled(normalizer="l1"), case(normalizer="l1"))
    power = case.arguments["power"]
    assert_equal(scaled(normalizer="none"), scale**power * case(normalizer="none"))


@deterministic
@given(case=cases(), seed=st.integers(0, 2**16))
def test_center_of_a_key_shift_subtracts_it_from_the_keys(case: Case, seed: int) -> None:
    query, key, value, coefficients = (tensor.detach() for tensor in case.tensors)
    _, heads, groups, _, _ = case.shape
    key, value = (tensor.repeat_interleave(heads // groups, 1) for tensor in (key, value))
    shift = torch.randn(heads, key.shape[3], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    arguments = {**case.arguments, "scaling": 0.3, "radius": 1.0, "clamp": False, "power": 1}
    centered = Case([query, key, value, coefficients], arguments, case.shape)
    shifted = Case([query, key - shift[:, None], value, coefficients], arguments, case.shape)
    center = 0.3 * (query * shift[:, None]).sum(-1)
    assert_equal(centered(center=center), shifted(center=0.0))


@pytest.mark.parametrize("change", ["mask", "normalizer", "power", "center", "radius", "clamp", "coefficients"])
def test_cases_tell_operators_apart(change: str) -> None:
    """The control of this file: of the cases drawn, most change when a part of the operator is dropped."""
    dropped = {"mask": None, "normalizer": "mean", "power": 1, "center": 0.0, "radius": 1.0, "clamp": False}
    differences = []

    @deterministic
    @given(case=cases(positional=False, normalizers=("rsqrt", "none", "l1")))
    def collect(case: Case) -> None:
        if change == "coefficients":
            coefficients = case.tensors[3].detach().roll(1, -1)
            other = Case([*case.tensors[:3], coefficients], case.arguments, case.shape)()
        else:
            other = case(**{change: dropped[change]})
        differences.append(bool((other - case()).abs().max() > 1e-4 * case().abs().max()))

    collect()
    assert sum(differences) > len(differences) / 3
