"""The matrix of calls on which the kernels are compared with the oracle (`cpu`, `triton` interpreted, on a GPU), and
claims that hold for every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from error_budget import excess, operands, outputs_and_gradients
from torch import Tensor

from hf_polyattn import polynomial_attention
from hf_polyattn.ops import library, packed_ranges

Shape = tuple[int, int, int, int, int]  # B, H, G, Tq, Tk

SHAPE: Shape = (1, 2, 1, 20, 33)
# Polynomials without a jump in any gradient, which no budget covers: p is positive where its sign counts.
TAYLOR4 = [1.0, 1.0, 1 / 2, 1 / 6, 1 / 24]
# p' is 0 where the clamp begins, too.
BUMP = [1.5, 1.0, 0.0, -1 / 3]


def noise(*size: int, seed: int = 7) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


class Case(NamedTuple):
    """One call: shape, head dims, coefficients (random of that degree if an int), and settings made of the shape."""

    settings: Callable[[Shape], dict[str, Any]] = lambda shape: {}
    coefficients: int | list[float] = 3
    shape: Shape = SHAPE
    dims: tuple[int, int] = (32, 16)


def constant(**settings: Any) -> Callable[[Shape], dict[str, Any]]:
    return lambda shape: settings


def monomial(degree: int, factor: float = 1.0) -> list[float]:
    return [0.0] * degree + [factor]


def interval(shape: Shape, **settings: Any) -> dict[str, Any]:
    """What calibration sets: a center for every row, a radius for every head, and the clamp."""
    radius = noise(shape[1]).abs() + 2.0
    return {"center": noise(shape[0], shape[1], shape[3]), "radius": radius, "clamp": True, **settings}


def left_padding(shape: Shape) -> Tensor:
    """Entry b sees all but its first 3·b keys; the last one sees none."""
    starts = 3 * torch.arange(shape[0])
    starts[-1] = shape[4]
    return torch.stack([starts, torch.full_like(starts, shape[4])], -1)[:, None]


def right_padding(shape: Shape) -> Tensor:
    stops = shape[4] - 5 * torch.arange(shape[0])
    return torch.stack([torch.zeros_like(stops), stops], -1)[:, None]


def packed(shape: Shape) -> Tensor:
    """Three sequences, of 1, 20 and the other rows but 3."""
    return packed_ranges(torch.tensor([0, 1, 21, shape[3] - 3]), shape[3])


def unordered(shape: Shape) -> Tensor:
    """Every row sees an interval of its own; some see nothing."""
    bounds = torch.randint(0, shape[4] + 1, (shape[0], shape[3], 2), generator=torch.Generator().manual_seed(5))
    return bounds.sort(-1).values


SPECS: dict[str, Case] = {
    **{f"degree{degree}": Case(constant(radius=2.0), degree) for degree in range(1, 9)},
    **{
        f"monomial{degree}": Case(constant(monomial=True, causal=True), monomial(degree, 0.7)) for degree in range(1, 9)
    },
    "monomial3-scaled": Case(constant(monomial=True, scaling=0.3, radius=1.5), monomial(3)),
    "monomial3-interval": Case(lambda s: interval(s, monomial=True), monomial(3, -2.0)),
    "monomial2^4-l1": Case(constant(monomial=True, power=4, normalizer="l1", radius=3.0), monomial(2, 1.3)),
    "monomial2-l1-negative": Case(constant(monomial=True, normalizer="l1"), monomial(2, -1.0)),
    "monomial7-l1-interval": Case(lambda s: interval(s, monomial=True, normalizer="l1"), monomial(7)),
    "interval": Case(interval, BUMP),
    "center-per-head": Case(lambda s: {"center": noise(s[1])}),
    "radius": Case(constant(radius=1.7, scaling=0.4)),
    "scaling0": Case(lambda s: interval(s, scaling=0.0), BUMP),
    **{
        f"power{power}": Case(lambda s, p=power: interval(s, power=p, normalizer="l1", causal=True), BUMP)
        for power in (1, 2, 4, 8, 16, 32)
    },
    "power4-mean": Case(lambda s: interval(s, power=4, normalizer="mean"), BUMP),
    "taylor4-l1": Case(constant(normalizer="l1"), TAYLOR4),
    "mean-causal": Case(constant(normalizer="mean", causal=True)),
    "none": Case(constant(normalizer="none")),
}
MASKS: dict[str, Case] = {
    "causal": Case(constant(causal=True)),
    "causal-Tq>Tk": Case(constant(causal=True), shape=(1, 2, 1, 63, 20)),
    "causal-Tq<Tk": Case(constant(causal=True), shape=(1, 2, 2, 20, 63)),
    "causal-square": Case(constant(causal=True, normalizer="l1"), TAYLOR4, (1, 1, 1, 64, 64)),
    "window": Case(constant(window=9)),
    "window-wide": Case(constant(window=40), shape=(1, 1, 1, 80, 80)),
    "causal-window-l1": Case(constant(causal=True, window=20, normalizer="l1"), TAYLOR4, (1, 1, 1, 65, 65)),
    "left-padding-causal": Case(lambda s: {"ranges": left_padding(s), "causal": True}, shape=(3, 1, 1, 20, 33)),
    "right-padding-l1": Case(lambda s: {"ranges": right_padding(s), "normalizer": "l1"}, TAYLOR4, (2, 1, 1, 20, 48)),
    "packed-causal": Case(lambda s: {"ranges": packed(s), "causal": True}, shape=(1, 1, 1, 63, 63)),
    "packed-window": Case(lambda s: {"ranges": packed(s), "window": 7, "normalizer": "mean"}, shape=(1, 1, 1, 63, 63)),
    "unordered-ranges": Case(lambda s: {"ranges": unordered(s)}, shape=(2, 1, 1, 33, 40)),
    "dense-mask": Case(lambda s: {"mask": noise(s[0], s[1], s[3], s[4]) > 0}, shape=(2, 2, 1, 20, 20)),
    "mask-per-key-causal": Case(
        lambda s: {"mask": noise(s[0], 1, 1, s[4]) > 0, "causal": True, "normalizer": "mean"}, shape=(2, 2, 1, 20, 33)
    ),
    "mask-per-row-l1": Case(lambda s: {"mask": noise(1, 1, s[3], s[4]) > 0, "normalizer": "l1"}, TAYLOR4),
    "dropout": Case(constant(dropout=0.3, causal=True)),
    "dropout-l1-mask": Case(
        lambda s: interval(s, dropout=0.3, normalizer="l1", power=4, mask=noise(1, s[1], s[3], s[4]) > -1), BUMP
    ),
}
SHAPES: dict[str, Case] = {
    "one": Case(shape=(8, 2, 2, 1, 1)),
    "short": Case(shape=(4, 2, 2, 7, 5)),
    "grouped": Case(constant(causal=True), shape=(1, 6, 2, 17, 17)),
    "multi-query-l1": Case(lambda s: interval(s, normalizer="l1"), BUMP, (1, 3, 1, 17, 20)),
    "D64": Case(dims=(64, 64), shape=(1, 1, 1, 33, 40)),
    "D80": Case(constant(causal=True), dims=(80, 80), shape=(1, 1, 1, 33, 40)),
    "D96-Dv32": Case(constant(normalizer="l1"), TAYLOR4, dims=(96, 32), shape=(1, 1, 1, 33, 40)),
    "D16-Dv72": Case(dims=(16, 72), shape=(1, 1, 1, 33, 40)),
    "D8-Dv24": Case(dims=(8, 24)),
    "D1-Dv3": Case(dims=(1, 3)),
    "D256": Case(dims=(256, 256), shape=(1, 1, 1, 17, 20)),
}
DECODE: dict[str, Case] = {
    "decode1": Case(shape=(1, 4, 2, 1, 50)),
    "decode1-monomial": Case(constant(monomial=True), monomial(3), (2, 2, 2, 1, 50)),
    "decode3-l1": Case(lambda s: interval(s, normalizer="l1", power=4), BUMP, (2, 3, 1, 3, 50), (80, 24)),
    "decode4-ranges": Case(lambda s: {"ranges": unordered(s), "normalizer": "mean"}, shape=(1, 4, 2, 4, 70)),
    "decode2-mask": Case(lambda s: {"mask": noise(s[0], 1, 1, s[4]) > 0, "dropout": 0.2}, shape=(1, 4, 2, 2, 50)),
    "decode16-window": Case(constant(window=100), shape=(1, 1, 1, 16, 257)),
}
CASES = {**SPECS, **MASKS, **SHAPES, **DECODE}
# Those that show all that float16 does otherwise: the interpreter is slow.
HALF = (
    "degree3", "monomial3", "monomial3-interval", "power1", "power16", "taylor4-l1", "mean-causal", "packed-causal",
    "dense-mask", "dropout-l1-mask", "short", "grouped", "D80", "decode1-monomial", "decode3-l1", "decode2-mask",
)  # fmt: skip


def inputs(case: Case, dtype: torch.dtype, seed: int, device: str) -> tuple[list[Tensor], dict[str, Any]]:
    degree = case.coefficients if isinstance(case.coefficients, int) else len(case.coefficients) - 1
    tensors = operands(case.shape, head_dim=case.dims[0], value_dim=case.dims[1], degree=degree, dtype=dtype, seed=seed)
    if not isinstance(case.coefficients, int):
        tensors[3] = torch.tensor(case.coefficients) * (1.0 + 0.1 * torch.arange(case.shape[1])[:, None])
    settings = case.settings(case.shape)
    settings = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in settings.items()}
    return [tensor.detach().to(device) for tensor in tensors], settings


def errors(
    case: Case, dtype: torch.dtype, backend: str = "triton", *, device: str = "cpu", draws: int = 2
) -> dict[str, float]:
    """Returns the error of the output and of every gradient over its budget, over some draws together."""
    results: dict[str, list[dict[str, Tensor]]] = {backend: [], "reference": [], "oracle": []}
    for seed in range(draws):
        tensors, settings = inputs(case, dtype, seed, device)
        for name, draw in results.items():
            torch.manual_seed(seed)  # the same dropout
            exact = [tensor.double() for tensor in tensors]
            run = backend if name == backend else "reference"
            draw.append(outputs_and_gradients(exact if name == "oracle" else tensors, **settings, backend=run))
    names = results["oracle"][0]
    return {name: excess(*(torch.stack([d[name] for d in draws]) for draws in results.values())) for name in names}


def stretched(case: Case, factor: int) -> Case:
    """Returns the case with longer sequences, which stay odd where they were."""
    batch, heads, groups, q_len, k_len = case.shape
    lengths = (length if length < 17 else factor * (length - 1) + 1 for length in (q_len, k_len))
    return case._replace(shape=(batch, heads, groups, *lengths))


# Claims that hold for every backend ---------------------------------------------------------------------------


def errors_with_and_without_masks(case: Case, dtype: torch.dtype, backend: str) -> tuple[float, float]:
    """Returns the error of the output over its budget, with the masks of the case and when they are dropped."""
    tensors, settings = inputs(case, dtype, 0, "cpu")
    without = {name: value for name, value in settings.items() if name not in ("mask", "ranges", "window", "causal")}
    exact = polynomial_attention(*(tensor.double() for tensor in tensors), **settings, backend="reference")
    same_dtype = polynomial_attention(*tensors, **settings, backend="reference").nan_to_num()
    outputs = (polynomial_attention(*tensors, **some, backend=backend).nan_to_num() for some in (settings, without))
    with_masks, without_masks = (excess(output, same_dtype, exact) for output in outputs)
    return with_masks, without_masks


def dropout_pattern(backend: str, probability: float, lengths: tuple[int, int] = (40, 40), *, seed: int = 0) -> Tensor:
    """Returns the scale of every weight, (B, Tq, H, Tk): values are the unit vectors and all weights 1."""
    torch.manual_seed(seed)
    query, key = (torch.zeros(2, 3, length, 1) for length in lengths)
    values = torch.eye(lengths[1]).expand(2, 3, -1, -1)
    ones = torch.tensor([[1.0, 0.0]])
    return polynomial_attention(query, key, values, ones, normalizer="none", dropout=probability, backend=backend)


def check_rows_that_see_nothing(backend: str, normalizer: str, power: int, dtype: torch.dtype) -> None:
    """Rows that see nothing are zeros, and so is what a key gets that no row sees; all else is finite."""
    tensors = operands((2, 2, 1, 18, 20), head_dim=16, value_dim=16, dtype=dtype)
    with torch.no_grad():
        tensors[1][:, :, 6] = 3e4  # with power 4, its weight overflows
    mask = (torch.arange(20) != 6).expand(2, 1, 18, 20).clone()
    mask[0, :, :2] = False
    # A dO of 100 over the ε of l1 overflows.
    settings: dict[str, Any] = {"normalizer": normalizer, "power": power, "radius": 8.0, "grad_scale": 100.0}
    results = outputs_and_gradients(tensors, mask=mask, **settings, backend=backend)
    output, query = results["output"], results["query"]
    assert output[0, :2].abs().max() == query[0, :, :2].abs().max() == 0.0
    assert results["key"][:, :, 6].abs().max() == results["value"][:, :, 6].abs().max() == 0.0
    assert output[1, :2].abs().max() > 0.0  # the same rows, which see something
    assert query[1, :, :2].abs().max() > 0.0
    assert all(bool(result.isfinite().all()) for result in results.values())


EMPTY: dict[str, Shape] = {"no-batch": (0, 2, 1, 5, 7), "no-query": (2, 2, 1, 0, 7), "no-key": (2, 2, 1, 5, 0)}


def check_empty_tensors(backend: str, shape: Shape, normalizer: str, dtype: torch.dtype) -> None:
    """The output and all gradients are zeros of their shapes and dtypes."""
    batch, heads, _, q_len, _ = shape
    tensors = operands(shape, dtype=dtype)
    center = noise(batch, heads, q_len)
    results = outputs_and_gradients(tensors, normalizer=normalizer, center=center, backend=backend)
    expected = [torch.zeros(batch, q_len, heads, 3, dtype=dtype), *map(torch.zeros_like, (*tensors, center))]
    for (name, result), zeros in zip(results.items(), expected, strict=True):
        assert result.dtype == zeros.dtype, name
        assert torch.equal(result, zeros), name


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "strided": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
}


def layout_difference(backend: str, layout: str, tensors: list[Tensor]) -> float:
    """Returns the largest difference that another layout in memory makes, relative to the largest value."""
    laid_out = [LAYOUTS[layout](tensor.detach()) for tensor in tensors]
    assert laid_out[0].stride() != tensors[0].stride()
    expected, results = (outputs_and_gradients(some, causal=True, backend=backend) for some in (tensors, laid_out))
    return max(float((results[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


def check_layout_of_gradients(backend: str, dtype: torch.dtype) -> None:
    """Gradients lie in memory as their operands do, tokens outside of heads or inside, and are the same numbers."""
    token_major = operands((2, 4, 2, 5, 20), head_dim=16, value_dim=16, dtype=dtype)
    head_major = [tensor.detach().contiguous() for tensor in token_major]
    found = [outputs_and_gradients(tensors, backend=backend) for tensors in (token_major, head_major)]
    for place, name in enumerate(("query", "key", "value")):
        assert token_major[place].stride() != head_major[place].stride()
        for tensors, results in zip((token_major, head_major), found, strict=True):
            assert results[name].stride() == tensors[place].stride(), name
        assert torch.equal(found[0][name], found[1][name]), name


def check_library_contract(arguments: Sequence[Any]) -> None:
    """The operator and its backward, called with the arguments of `library.attention`, pass `opcheck`."""
    torch.library.opcheck(library.attention, tuple(arguments))
    detached = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    output, row_scale = library.attention(*detached)
    kept = output if row_scale.numel() else row_scale  # as autograd keeps it
    gradient_arguments = (torch.randn_like(output), kept, row_scale, True, True, *detached)
    torch.library.opcheck(library.attention_backward, gradient_arguments)
