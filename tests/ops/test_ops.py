"""The operator computes the formula of DESIGN.md, in every backend, forward and backward."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from error_budget import excess, operands, outputs_and_gradients
from kernel_cases import (
    BUMP,
    EMPTY,
    LAYOUTS,
    TAYLOR4,
    Case,
    Shape,
    check_empty_tensors,
    check_layout_of_gradients,
    check_library_contract,
    check_rows_that_see_nothing,
    dropout_pattern,
    errors,
    inputs,
    interval,
    layout_difference,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_polyattn import BackendError, InputError, polynomial_attention
from hf_polyattn.ops import BACKENDS, chunked, packed_ranges
from hf_polyattn.ops.call import Call
from hf_polyattn.spec import NORMALIZERS, POWERS

SHAPE: Shape = (2, 4, 2, 5, 7)
# Those that run everywhere and in float64; test_cpu.py, interpreter/ and gpu/ test the kernels.
backends = pytest.mark.parametrize("backend", ["chunked", "reference"])
normalizers = pytest.mark.parametrize("normalizer", NORMALIZERS)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every call of these tests cross block boundaries in batch, heads and rows."""
    monkeypatch.setattr(chunked, "_BLOCK_WEIGHTS_CPU", 32)
    monkeypatch.setattr(chunked, "_BAND_ROWS", 2)


def noise(*size: int, seed: int = 7) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padding(shape: Shape, rows: int = 1) -> Tensor:
    """(B, 1, rows, Tk): entry b sees all but its first b + 1 keys, as with left padding."""
    batch, _, _, _, k_len = shape
    return (torch.arange(k_len) > torch.arange(batch)[:, None])[:, None, None].expand(-1, 1, rows, -1)


def row_ranges(shape: Shape) -> Tensor:
    """(1, Tq, 2): each row sees some keys in the middle, the last row none."""
    start = torch.arange(shape[3]) % 3
    stop = (start + 3).clamp(max=shape[4])
    return torch.stack([start, torch.where(torch.arange(shape[3]) == shape[3] - 1, start, stop)], dim=-1)[None]


# Name -> settings for B, H, G, Tq, Tk. Without them the result is another one.
FEATURES: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "key-padding": lambda s: {"mask": padding(s)},
    "padding-4d": lambda s: {"mask": padding(s, rows=s[3])},
    "dense-mask": lambda s: {"mask": noise(s[0], s[1], s[3], s[4]) > 0},
    "mask-per-head": lambda s: {"mask": noise(1, s[1], 1, s[4]) > 0},
    "mask-per-row": lambda s: {"mask": noise(1, 1, s[3], s[4]) > 0},
    "ranges": lambda s: {"ranges": torch.tensor([[[1, s[4]]], [[0, s[4] - 2]]])[: s[0]]},
    "ranges-per-row": lambda s: {"ranges": row_ranges(s)},
    "packed": lambda s: {"ranges": packed_ranges(torch.tensor([0, 2, 2, 5]), s[3]), "causal": True},
    "causal": lambda s: {"causal": True},
    "window": lambda s: {"window": 2},
    "causal-window": lambda s: {"causal": True, "window": 2},
    "causal-padding": lambda s: {"causal": True, "mask": padding(s)},
    "ranges-window-mask": lambda s: {"ranges": row_ranges(s), "window": 4, "mask": noise(1, 1, s[3], s[4]) > -1},
    "scaling": lambda s: {"scaling": 0.9},
    "center": lambda s: {"center": 0.7},
    "center-per-head": lambda s: {"center": noise(s[1])},
    "center-per-row": lambda s: {"center": noise(s[0], s[1], s[3])},
    "radius": lambda s: {"radius": 1.7},
    "radius-per-head": lambda s: {"radius": noise(s[1]).abs() + 0.5},
    "clamp": lambda s: {"clamp": True},
    "interval": lambda s: {
        "clamp": True,
        "center": noise(s[0], s[1], s[3]),
        "radius": noise(s[1]).abs() + 0.5,
        "causal": True,
    },
}
features = pytest.mark.parametrize("feature", FEATURES)
# What a gradient can depend on.
MASKS = ["dense", "key-padding", "dense-mask", "causal", "window"]
DENSE: dict[str, Callable[[Shape], dict[str, Any]]] = {"dense": lambda s: {}}


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    *,
    mask: Tensor | None = None,
    ranges: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scaling: float | None = None,
    power: int = 1,
    normalizer: str = "rsqrt",
    center: float | Tensor = 0.0,
    radius: float | Tensor = 1.0,
    clamp: bool = False,
) -> Tensor:
    """The formula of DESIGN.md, one weight after another, in numpy."""
    batch, heads, q_len, head_dim = query.shape
    groups, k_len = key.shape[1:3]
    q, k, v, c = (tensor.detach().double().numpy() for tensor in (query, key, value, coefficients))
    m = np.broadcast_to(np.ones(()) if mask is None else mask.numpy(), (batch, heads, q_len, k_len))
    spans = np.broadcast_to(np.array([0, k_len]) if ranges is None else ranges.numpy(), (batch, q_len, 2))
    centers = np.asarray(center)
    centers = np.broadcast_to(centers[:, None] if centers.ndim == 1 else centers, (batch, heads, q_len))
    radii = np.broadcast_to(np.asarray(radius), heads)
    out = np.zeros((batch, q_len, heads, v.shape[3]))
    for b, h, i in np.ndindex(batch, heads, q_len):
        g = h // (heads // groups)
        seen = [
            j
            for j in range(k_len)
            if m[b, h, i, j]
            and spans[b, i, 0] <= j < spans[b, i, 1]
            and not (causal and j > i)
            and not (window is not None and abs(i - j) >= window)
        ]
        total = 0.0
        for j in seen:
            x = (head_dim**-0.5 if scaling is None else scaling) * float(np.dot(q[b, h, i], k[b, g, j]))
            t = (x - centers[b, h, i]) / radii[h]
            if clamp:
                t = min(1.0, max(-1.0, t))
            w = sum(c_k * t**degree for degree, c_k in enumerate(c[h])) ** power
            total += abs(w)
            out[b, i, h] += w * v[b, g, j]
        n = max(1, len(seen))
        out[b, i, h] *= {"rsqrt": n**-0.5, "mean": 1 / n, "none": 1.0, "l1": 1 / (1e-37 + total)}[normalizer]
    return torch.from_numpy(out)


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float(((one - other).abs().max() / other.abs().max()).detach())


# The formula ------------------------------------------------------------------------------------------------


@backends
@features
@pytest.mark.parametrize("shape", [SHAPE, (2, 4, 1, 7, 5), (1, 3, 3, 6, 6)], ids=["Tq<Tk", "Tq>Tk", "square"])
def test_every_feature_matches_the_formula(backend: str, feature: str, shape: Shape) -> None:
    tensors, settings = operands(shape), FEATURES[feature](shape)
    expected = naive(*tensors, **settings)
    assert distance(polynomial_attention(*tensors, **settings, backend=backend), expected) < 1e-12
    assert distance(polynomial_attention(*tensors, backend=backend), expected) > 1e-2


@backends
@normalizers
@pytest.mark.parametrize("power", POWERS)
def test_every_normalizer_and_power_matches_the_formula(backend: str, normalizer: str, power: int) -> None:
    tensors = operands()
    settings = {"causal": True, "mask": padding(SHAPE), "clamp": True}
    expected = naive(*tensors, **settings, normalizer=normalizer, power=power)
    output = polynomial_attention(*tensors, **settings, normalizer=normalizer, power=power, backend=backend)
    assert distance(output, expected) < 1e-11

    other_power = naive(*tensors, **settings, normalizer=normalizer, power=2 if power == 1 else power // 2)
    other_normalizer = naive(*tensors, **settings, normalizer="mean" if normalizer == "l1" else "l1", power=power)
    assert distance(other_power, expected) > 1e-2
    assert distance(other_normalizer, expected) > 1e-2


@backends
@pytest.mark.parametrize("degree", range(1, 9))
def test_every_degree_matches_the_formula(backend: str, degree: int) -> None:
    tensors = operands(degree=degree)
    expected = naive(*tensors)
    assert distance(polynomial_attention(*tensors, backend=backend), expected) < 1e-12
    for k in range(degree + 1):
        changed = tensors[3].detach().clone()
        changed[:, k] += 0.1
        assert distance(polynomial_attention(*tensors[:3], changed, backend=backend), expected) > 1e-6


@backends
def test_one_row_of_coefficients_serves_all_heads(backend: str) -> None:
    query, key, value, coefficients = operands()
    shared = coefficients[:1].detach().requires_grad_()
    output = polynomial_attention(query, key, value, shared, backend=backend)
    expanded = polynomial_attention(query, key, value, shared.expand(4, -1), backend=backend)
    assert torch.equal(output, expanded)
    assert torch.autograd.grad(output.sum(), shared)[0].shape == shared.shape


@backends
def test_query_head_reads_the_key_head_of_its_group(backend: str) -> None:
    query, key, value, coefficients = operands()
    expanded = polynomial_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), coefficients, backend=backend
    )
    interleaved = polynomial_attention(
        query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1), coefficients, backend=backend
    )
    output = polynomial_attention(query, key, value, coefficients, backend=backend)
    assert distance(output, expanded) < 1e-12
    assert distance(output, interleaved) > 1e-2


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_output_is_contiguous_and_in_the_dtype_of_the_query(backend: str, dtype: torch.dtype) -> None:
    output = polynomial_attention(*operands(dtype=dtype), backend=backend)
    assert output.shape == (2, 5, 4, 3)
    assert output.is_contiguous()
    assert output.dtype == dtype


@normalizers
def test_returned_weights_are_those_that_make_the_output(normalizer: str) -> None:
    tensors = operands()
    settings = {"causal": True, "normalizer": normalizer}
    output, weights = polynomial_attention(*tensors, **settings, return_weights=True)
    assert weights.shape == (2, 4, 5, 7)
    expanded = tensors[2].repeat_interleave(2, 1)
    assert distance(output, (weights @ expanded).transpose(1, 2)) < 1e-12
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))
    assert weights.tril().abs().min(dim=-1).values.max() >= 0.0
    row_sums = weights.abs().sum(-1)
    assert bool(torch.allclose(row_sums, torch.ones_like(row_sums))) is (normalizer == "l1")


def test_returned_weights_of_half_precision_are_float32() -> None:
    output, weights = polynomial_attention(*operands(dtype=torch.bfloat16), return_weights=True)
    assert (output.dtype, weights.dtype) == (torch.bfloat16, torch.float32)


# Gradients --------------------------------------------------------------------------------------------------


@backends
@normalizers
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("power", [1, 4], ids=["power1", "power4-clamp"])
def test_gradients_match_finite_differences(backend: str, normalizer: str, mask: str, power: int) -> None:
    shape = (2, 2, 1, 3, 3)
    tensors = operands(shape, head_dim=2, value_dim=2, degree=2)
    center = noise(2, 2, 3).requires_grad_()
    settings = {**DENSE, **FEATURES}[mask](shape)

    def attend(*inputs: Tensor) -> Tensor:
        return polynomial_attention(
            *inputs[:4],
            center=inputs[4],
            radius=1.5,
            clamp=power > 1,
            power=power,
            normalizer=normalizer,
            backend=backend,
            **settings,
        )

    assert torch.autograd.gradcheck(attend, (*tensors, center))


@backends
def test_clamped_scores_have_no_gradient(backend: str) -> None:
    tensors = operands()
    inside = outputs_and_gradients(tensors, radius=100.0, clamp=True, backend=backend)
    outside = outputs_and_gradients(tensors, center=100.0, clamp=True, backend=backend)
    for name in ("query", "key"):
        assert inside[name].abs().max() > 0.0
        assert outside[name].abs().max() == 0.0


def test_gradient_of_the_radius_comes_from_the_reference() -> None:
    tensors = operands((1, 2, 1, 3, 3), head_dim=2, value_dim=2, degree=2)
    radius = (noise(2).abs() + 1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda radius: polynomial_attention(*tensors, radius=radius), (radius,))
    with pytest.raises(BackendError, match="'chunked' cannot run this call: it has no gradient for the radius"):
        polynomial_attention(*tensors, radius=radius, backend="chunked")


def test_second_derivatives_are_refused_by_the_fused_operator() -> None:
    tensors = operands()
    for backend, outcome in (("reference", None), ("chunked", "first derivatives only")):
        output = polynomial_attention(*tensors, backend=backend)
        (gradient,) = torch.autograd.grad(output.sum(), tensors[0], create_graph=True)
        if outcome is None:
            assert torch.autograd.grad(gradient.sum(), tensors[1])[0].abs().max() > 0.0
        else:
            with pytest.raises(BackendError, match=outcome):
                torch.autograd.grad(gradient.sum(), tensors[1])


# The error budget -------------------------------------------------------------------------------------------

SMOOTH = {
    "poly3": Case(coefficients=[0.0, 0.0, 0.0, 1.0]),
    "mean-causal": Case(lambda s: {"normalizer": "mean", "causal": True}, [0.3, -0.2, 0.5, 1.0]),
    "taylor4-l1-padding": Case(lambda s: {"normalizer": "l1", "mask": padding(s, rows=s[3])}, TAYLOR4),
    "poly3^16-l1-interval": Case(lambda s: interval(s, normalizer="l1", power=16), BUMP),
}
BUDGETED: list[tuple[Shape, str]] = [
    *(((16, 4, 2, 1, 1), case) for case in ("poly3", "mean-causal")),  # l1 of one key has no gradient
    *((shape, case) for shape in ((16, 4, 2, 7, 5), (4, 4, 2, 63, 65), (2, 4, 1, 129, 127)) for case in SMOOTH),
    *(((1, 2, 1, 1000, 1000), case) for case in ("poly3", "poly3^16-l1-interval")),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "case"), BUDGETED, ids=[f"B{s[0]}-H{s[1]}-G{s[2]}-T{s[3]}x{s[4]}-{case}" for s, case in BUDGETED]
)
def test_chunked_is_within_the_error_budget(
    shape: Shape, case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "_BLOCK_WEIGHTS_CPU", 32 * shape[4])
    monkeypatch.setattr(chunked, "_BAND_ROWS", 16)
    for name, error in errors(SMOOTH[case]._replace(shape=shape, dims=(64, 32)), dtype, "chunked").items():
        assert error <= 1.0, name


@pytest.mark.parametrize(
    "wrong",
    [{"mask": None}, {"normalizer": "mean"}, {"power": 2}, {"clamp": False}, {"center": 0.0}, {"radius": 4.0}],
    ids=lambda wrong: "-".join(wrong),
)
def test_error_budget_notices_what_is_dropped(wrong: dict[str, Any]) -> None:
    case = SMOOTH["poly3^16-l1-interval"]._replace(shape=(4, 4, 2, 63, 65), dims=(64, 32))
    tensors, settings = inputs(case, torch.bfloat16, 0, "cpu")
    settings["mask"] = padding((4, 4, 2, 63, 65))
    exact = outputs_and_gradients([tensor.double() for tensor in tensors], **settings, backend="reference")
    same_dtype = outputs_and_gradients(tensors, **settings, backend="reference")
    candidate = outputs_and_gradients(tensors, **{**settings, **wrong}, backend="chunked")
    for name in ("output", "query", "key", "value", "coefficients"):
        assert excess(candidate[name], same_dtype[name], exact[name]) > 2.0, name


# Layouts, masked rows, empty tensors ------------------------------------------------------------------------


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


# Blocks and memory ------------------------------------------------------------------------------------------


def make_call(tensors: list[Tensor], **settings: Any) -> Call:
    """The call that the operator hands to a backend."""
    calls: list[Call] = []
    spy = SimpleNamespace(forward=lambda call: calls.append(call) or chunked.forward(call))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(BACKENDS["chunked"]), "load", lambda backend: spy)
        with torch.no_grad():
            polynomial_attention(*tensors, **settings, backend="chunked")
    return calls[0]


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


# Dropout ----------------------------------------------------------------------------------------------------


def test_backends_drop_the_same_weights() -> None:
    pattern = dropout_pattern("chunked", 0.3)
    assert torch.equal(pattern, dropout_pattern("reference", 0.3))
    assert not torch.equal(pattern, dropout_pattern("reference", 0.3, seed=1))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropped_fraction_is_the_probability(probability: float) -> None:
    pattern = dropout_pattern("chunked", probability, (256, 256))
    kept = pattern > 0
    assert torch.allclose(pattern[kept], torch.tensor(1.0 / (1.0 - probability)))
    deviation = (probability * (1.0 - probability)) ** 0.5
    # Binomial bounds of 5 standard deviations: over all weights, each row, each column, and pairs of neighbours.
    assert abs(kept.double().mean() - (1.0 - probability)) < 5 * deviation / kept.numel() ** 0.5
    for axis, count in ((-1, 256), (1, 256)):
        fractions = kept.double().mean(axis)
        assert (fractions - (1.0 - probability)).abs().max() < 5 * deviation / count**0.5
    centered = kept.double() - (1.0 - probability)
    for axis in range(4):
        size = centered.shape[axis] - 1
        product = centered.narrow(axis, 0, size) * centered.narrow(axis, 1, size)
        assert abs(product.mean()) < 5 * deviation**2 / product.numel() ** 0.5


def test_dropout_preserves_the_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_BLOCK_WEIGHTS_CPU", 10**6)
    tensors = [tensor.detach() for tensor in operands()]
    torch.manual_seed(0)
    draws = torch.stack([polynomial_attention(*tensors, normalizer="l1", dropout=0.3) for _ in range(400)])
    error = (draws.mean(0) - polynomial_attention(*tensors, normalizer="l1")).abs()
    assert bool((error < 5 * draws.std(0) / 400**0.5).all())
    assert draws.std(0).min() > 0.0


@normalizers
def test_backward_drops_what_forward_dropped(normalizer: str) -> None:
    settings = {"normalizer": normalizer, "power": 2, "causal": True, "window": 3, "dropout": 0.4}
    results = []
    for backend, seed in (("reference", 0), ("chunked", 0), ("chunked", 1)):
        torch.manual_seed(seed)
        results.append(outputs_and_gradients(operands(), **settings, backend=backend))
    for name, expected in results[0].items():
        assert distance(results[1][name], expected) < 1e-12
        assert distance(results[2][name], expected) > 1e-2


@backends
def test_no_dropout_draws_no_random_numbers(backend: str) -> None:
    tensors = operands()
    state = torch.get_rng_state()
    output = polynomial_attention(*tensors, dropout=0.0, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output, polynomial_attention(*tensors, backend=backend))
    assert not torch.equal(output, polynomial_attention(*tensors, dropout=0.5, backend=backend))
    assert not torch.equal(torch.get_rng_state(), state)


@backends
def test_manual_seed_governs_dropout(backend: str) -> None:
    tensors = operands()
    torch.manual_seed(3)
    first, second = (polynomial_attention(*tensors, dropout=0.5, backend=backend) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(polynomial_attention(*tensors, dropout=0.5, backend=backend), first)
    assert not torch.equal(first, second)


@backends
def test_checkpointing_recomputes_the_same_dropout(backend: str) -> None:
    tensors = operands()

    def gradient(run: Callable[..., Tensor], **options: Any) -> Tensor:
        torch.manual_seed(0)
        output = run(lambda *t: polynomial_attention(*t, dropout=0.4, backend=backend), *tensors, **options)
        return torch.autograd.grad(output.square().sum(), tensors[0])[0]

    expected = gradient(lambda function, *args: function(*args))
    assert torch.equal(gradient(checkpoint, use_reentrant=False), expected)
    assert not torch.equal(gradient(checkpoint, use_reentrant=False, preserve_rng_state=False), expected)


# torch.library, torch.compile, autocast ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalizer": "l1", "power": 16, "clamp": True, "causal": True, "window": 3},
        {"mask": padding(SHAPE), "center": noise(4).float(), "radius": 2.0},
        {"dropout": 0.2},
    ],
    ids=["dense", "l1-causal", "padding-interval", "dropout"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_obeys_the_library_contract(settings: dict[str, Any], dtype: torch.dtype) -> None:
    call = make_call(operands(dtype=dtype), **settings)
    arguments = [getattr(call, name) for name in Call.__slots__]
    check_library_contract([*arguments, "chunked"])


def attend_causally(backend: str, *inputs: Tensor) -> Tensor:
    query, key, value, coefficients, center, mask = inputs
    return polynomial_attention(
        query, key, value, coefficients, mask=mask, causal=True, window=4, center=center, radius=2.0, clamp=True,
        power=2, normalizer="l1", backend=backend,
    )  # fmt: skip


@backends
def test_compiled_operator_equals_eager_at_every_length(backend: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend_causally, fullgraph=True, backend=counter)
    for length in (6, 9, 11, 13):
        tensors = [*operands((2, 4, 2, length, length)), noise(2, 4, length).requires_grad_()]
        mask = padding((2, 4, 2, length, length), rows=length)
        outputs = [run(backend, *tensors, mask) for run in (compiled, attend_causally)]
        results = [(output, *torch.autograd.grad(output.square().sum(), tensors)) for output in outputs]
        for compiled_result, eager_result in zip(*results, strict=True):
            assert distance(compiled_result, eager_result) < 1e-12
    assert counter.frame_count == 2  # the first length as a constant, then every length


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: g++")
def test_inductor_compiles_the_reference() -> None:
    torch._dynamo.reset()
    tensors = [*operands((2, 4, 2, 6, 6)), noise(2, 4, 6).requires_grad_()]
    mask = padding((2, 4, 2, 6, 6), rows=6)
    compiled = torch.compile(attend_causally, fullgraph=True)("reference", *tensors, mask)
    eager = attend_causally("reference", *tensors, mask)
    assert distance(compiled, eager) < 1e-12
    gradients = [torch.autograd.grad(output.square().sum(), tensors) for output in (compiled, eager)]
    for compiled_gradient, eager_gradient in zip(*gradients, strict=True):
        assert distance(compiled_gradient, eager_gradient) < 1e-12


@backends
def test_autocast_casts_the_operands_and_nothing_inside(backend: str) -> None:
    query, key, value, coefficients = operands(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = polynomial_attention(query, key.bfloat16(), value, coefficients, backend=backend)
        (gradient,) = torch.autograd.grad(output.sum(), query)
    expected = polynomial_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), coefficients, backend=backend)
    assert output.dtype == torch.bfloat16
    assert gradient.dtype == torch.float32
    assert torch.equal(output, expected)
    exact = polynomial_attention(query, key, value, coefficients, backend=backend)
    assert 0.0 < distance(output.float(), exact) < 0.05


# Errors -----------------------------------------------------------------------------------------------------

MASK = torch.ones(2, 1, 5, 7, dtype=torch.bool)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "three-dimensions": ({"query": torch.ones(4, 5, 4)}, r"need 4 dimensions .* got query \(4, 5, 4\)"),
    "batch": ({"key": torch.ones(3, 2, 7, 4)}, r"shapes do not fit: .* key \(3, 2, 7, 4\).*Allowed: query \(B, H"),
    "head-dim": ({"query": torch.ones(2, 4, 5, 8)}, r"shapes do not fit: query \(2, 4, 5, 8\)"),
    "no-head-dim": ({"query": torch.ones(2, 4, 5, 0), "key": torch.ones(2, 2, 7, 0)}, "shapes do not fit.*D >= 1"),
    "value-length": ({"value": torch.ones(2, 2, 6, 3)}, r"shapes do not fit: .* value \(2, 2, 6, 3\)"),
    "heads": ({"query": torch.ones(2, 3, 5, 4)}, "must be a multiple of key/value heads; got 3 and 2"),
    "mixed-dtypes": ({"key": torch.ones(2, 2, 7, 4).half()}, "need one dtype of .* got torch.float32, torch.float16"),
    "integers": ({n: torch.ones(s).long() for n, s in (("query", (2, 4, 5, 4)), ("key", (2, 2, 7, 4)),
                  ("value", (2, 2, 7, 3)))}, "got torch.int64"),
    "coefficients-heads": ({"coefficients": torch.ones(3, 4)}, r"\(H, P \+ 1\) or \(1, P \+ 1\) with H = 4; got"),
    "coefficients-dtype": ({"coefficients": torch.ones(4, 4).long()}, "coefficients must be float .* torch.int64"),
    "degree-0": ({"coefficients": torch.ones(4, 1)}, r"degree must be in 1\.\.8; got 1 coefficients"),
    "degree-9": ({"coefficients": torch.ones(4, 10)}, r"degree must be in 1\.\.8; got 10 coefficients"),
    "device": ({"coefficients": torch.ones(4, 4, device="meta")}, "must share a device; got cpu, cpu, cpu, meta"),
    "mask-dtype": ({"mask": MASK.float()}, "mask must be bool, True = visible; got torch.float32.*mask == 0"),
    "mask-shape": ({"mask": MASK[..., :6]}, r"mask \(2, 1, 5, 6\) does not fit; allowed: .* Tk = 7"),
    "mask-keys-1": ({"mask": MASK[..., :1]}, r"mask \(2, 1, 5, 1\) does not fit"),
    "mask-2d": ({"mask": MASK[:, 0, 0]}, r"mask \(2, 7\) does not fit"),
    "ranges-dtype": ({"ranges": torch.ones(2, 5, 2)}, "ranges must be int, .*; got torch.float32"),
    "ranges-shape": ({"ranges": torch.ones(2, 4, 2, dtype=torch.int32)}, r"ranges \(2, 4, 2\) do not fit; .* Tq = 5"),
    "ranges-device": ({"ranges": torch.ones(1, 1, 2, dtype=torch.int32, device="meta")}, "ranges are on meta"),
    "mask-device": ({"mask": MASK.to("meta")}, "mask is on meta, query on cpu"),
    "normalizer": ({"normalizer": "softmax"}, "normalizer 'softmax' is not one of .*'l1'"),
    "power": ({"power": 3}, r"power 3 is not one of \(1, 2, 4, 8, 16, 32\)"),
    "window": ({"window": 0}, "window must be at least 1 key, got 0"),
    "dropout-1": ({"dropout": 1.0}, r"dropout must be a probability in \[0, 1\), got 1.0"),
    "dropout-negative": ({"dropout": -0.1}, r"dropout must be a probability in \[0, 1\), got -0.1"),
    "center-shape": ({"center": torch.ones(5)}, r"center must be a float, \(H,\) or \(B, H, Tq\) .* got \(5,\)"),
    "center-device": ({"center": torch.ones(4, device="meta")}, "center is on meta, query on cpu"),
    "radius-0": ({"radius": 0.0}, "radius must be positive, got 0.0"),
    "radius-nan": ({"radius": float("nan")}, "radius must be positive, got nan"),
    "radius-shape": ({"radius": torch.ones(2)}, r"radius must be a float or \(H,\) with H = 4; got \(2,\)"),
    "radius-device": ({"radius": torch.ones(4, device="meta")}, "radius is on meta, query on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named_with_what_is_allowed(case: str) -> None:
    right = dict(zip(("query", "key", "value", "coefficients"), operands(dtype=torch.float32), strict=True))
    polynomial_attention(**right)
    wrong, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        polynomial_attention(**{**right, **wrong})


def test_unknown_backend_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        BackendError,
        match=r"backend 'cuda' does not exist. Use one of \['auto', 'triton', 'cpu', 'chunked', 'reference'\]",
    ):
        polynomial_attention(*operands(), backend="cuda")


def test_backend_asked_for_by_name_never_falls_back() -> None:
    message = r"backend 'chunked' cannot run this call: .*return_weights=True.*Use backend='reference' or 'auto'"
    with pytest.raises(BackendError, match=message):
        polynomial_attention(*operands(), backend="chunked", return_weights=True)
    output, _ = polynomial_attention(*operands(), backend="auto", return_weights=True)
    assert torch.equal(output, polynomial_attention(*operands(), backend="reference"))


def test_auto_takes_the_chunked_backend() -> None:
    assert "GeneratedBackward" in type(polynomial_attention(*operands()).grad_fn).__name__
    assert "GeneratedBackward" not in type(polynomial_attention(*operands(), backend="reference").grad_fn).__name__
