"""`score_moments` beside the mean and the variance of the scores themselves, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import MASKS, Shape, noise
from torch import Tensor

from hf_polyattn import InputError
from hf_polyattn.ops import moments, score_moments

SETTINGS = ("mask", "ranges", "causal", "window")


def key_mask(shape: Shape) -> dict[str, Any]:
    return {"mask": noise(shape[0], 1, 1, shape[4]) > -0.5}


def padded(shape: Shape) -> dict[str, Any]:
    return {"ranges": torch.tensor([[[3, shape[4]]], [[0, shape[4] - 2]]])[: shape[0]]}


# Settings made of the shape (B, H, G, Tq, Tk).
CASES: dict[str, tuple[Callable[[Shape], dict[str, Any]], Shape]] = {
    "all": (lambda s: {}, (2, 4, 2, 20, 33)),
    "one-row": (lambda s: {}, (2, 4, 2, 1, 33)),
    "keys-masked": (key_mask, (2, 4, 2, 20, 33)),
    "padded": (padded, (2, 4, 2, 20, 33)),
    "keys-masked-and-padded": (lambda s: key_mask(s) | padded(s), (2, 4, 4, 20, 33)),
    "causal-short": (lambda s: {"causal": True}, (2, 4, 2, 20, 20)),
    "causal-long": (lambda s: {"causal": True}, (1, 4, 2, 200, 200)),
    "causal-padded": (lambda s: {"causal": True} | padded(s), (2, 4, 2, 150, 150)),
    "causal-keys-masked": (lambda s: {"causal": True} | key_mask(s), (2, 2, 2, 130, 130)),
    **{
        name: (lambda s, case=case: {k: v for k, v in case.settings(s).items() if k in SETTINGS}, case.shape)
        for name, case in MASKS.items()
    },
}


def operands(shape: Shape, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Returns query and key whose means are far from 0, where a difference of squares cancels."""
    batch, heads, groups, q_len, k_len = shape
    query = noise(batch, q_len, heads, 16, seed=1).transpose(1, 2) + 1.0
    key = noise(batch, k_len, groups, 16, seed=2).transpose(1, 2) + 3.0
    return [query.to(dtype), key.to(dtype)]


def expected(query: Tensor, key: Tensor, scaling: float = 0.25, **settings: Any) -> tuple[Tensor, Tensor]:
    """Returns the moments by their definition, row by row."""
    batch, heads, q_len, _ = query.shape
    k_len = key.shape[2]
    visible = torch.ones(batch, heads, q_len, k_len, dtype=torch.bool)
    i, j = torch.arange(q_len)[:, None], torch.arange(k_len)
    if settings.get("mask") is not None:
        visible &= settings["mask"]
    if settings.get("ranges") is not None:
        start, stop = settings["ranges"][:, None, :, None].unbind(-1)
        visible &= (start <= j) & (j < stop)
    if settings.get("causal"):
        visible &= j <= i
    if settings.get("window") is not None:
        visible &= (i - j).abs() < settings["window"]
    scores = scaling * query @ key.repeat_interleave(heads // key.shape[1], 1).mT
    mean, variance = torch.zeros(2, batch, heads, q_len, dtype=query.dtype)
    for place in visible.any(-1).nonzero().tolist():
        seen = scores[tuple(place)][visible[tuple(place)]]
        mean[tuple(place)], variance[tuple(place)] = seen.mean(), seen.var(correction=0)
    return mean, variance


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_moments_are_those_of_the_visible_scores(case: str, backend: str) -> None:
    settings, shape = CASES[case]
    tensors = operands(shape, torch.float64)
    found = score_moments(*tensors, scaling=0.25, backend=backend, **settings(shape))
    for one, two in zip(found, expected(*tensors, **settings(shape)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_are_as_exact_as_those_of_float32_scores(case: str, dtype: torch.dtype) -> None:
    settings, shape = CASES[case]
    tensors = operands(shape, dtype)
    exact = score_moments(*(t.double() for t in tensors), backend="reference", **settings(shape))
    same = score_moments(*tensors, backend="reference", **settings(shape))
    for name, ours, reference, truth in zip(
        ("mean", "variance"), score_moments(*tensors, **settings(shape)), same, exact, strict=True
    ):
        assert ours.dtype == torch.float32
        budget = 3.0 * (reference - truth).abs().max() + 8 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= budget, name


@pytest.mark.parametrize("case", ["all", "padded", "causal-padded", "window", "unordered-ranges", "dense-mask"])
@pytest.mark.parametrize("passes", [False, True], ids=["at-once", "in-passes"])
def test_gradients(case: str, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, shape = CASES[case]
    if passes:
        monkeypatch.setattr(moments, "_SCORES", 0)
    leaves = [[t.requires_grad_() for t in operands(shape, torch.float64)] for _ in range(2)]
    weights = [noise(*shape[:2], shape[3], seed=seed).double() for seed in (3, 4)]
    found = score_moments(*leaves[0], scaling=0.25, **settings(shape))
    truth = score_moments(*leaves[1], scaling=0.25, backend="reference", **settings(shape))
    grads = [
        torch.autograd.grad(sum((m * w).sum() for m, w in zip(results, weights, strict=True)), some)  # type: ignore[arg-type]
        for results, some in ((found, leaves[0]), (truth, leaves[1]))
    ]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_hidden_keys_may_hold_anything() -> None:
    query, key = operands((2, 2, 2, 20, 20))
    mask = torch.arange(20) < 15
    expected_moments = score_moments(query, key[:, :, :15])
    key[:, :, 15:] = torch.nan
    for found, truth in zip(score_moments(query, key, mask=mask[None, None, None]), expected_moments, strict=True):
        torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("settings", [{}, {"causal": True}], ids=str)
def test_compiled_and_exported(settings: dict[str, Any]) -> None:
    class Moments(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            return score_moments(query, key, **settings)

    tensors = operands((2, 4, 2, 70, 70))
    length, batch = torch.export.Dim("length", min=2), torch.export.Dim("batch")
    dynamic = {0: batch, 2: length}
    program = torch.export.export(Moments(), tuple(tensors), dynamic_shapes=(dynamic, dynamic)).module()
    compiled = torch.compile(Moments(), fullgraph=True, backend="aot_eager")
    for some in (tensors, operands((3, 4, 2, 131, 131))):
        for found in (program(*some), compiled(*some)):
            for one, two in zip(found, score_moments(*some, backend="reference", **settings), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_autocast_rounds_queries_and_keys() -> None:
    query, key = operands((1, 2, 2, 9, 9))
    with torch.autocast("cpu", torch.bfloat16):
        found = score_moments(query, key)
    for one, two in zip(found, score_moments(query.bfloat16(), key.bfloat16()), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k: (q[0], k), "do not fit"),
        (lambda q, k: (q, k[..., :3]), "do not fit"),
        (lambda q, k: (q, k.double()), "one dtype"),
        (lambda q, k: (q[:, :3], k), "multiple of key heads"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_moments(*change(*operands((2, 4, 2, 5, 5))))
