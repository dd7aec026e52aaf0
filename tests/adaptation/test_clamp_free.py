"""Polynomials that nothing clamps: fitted to every score that occurs, kept so by all tools, and watched over."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from fitting_cases import CPU, HEADS, random_rows
from torch import Tensor

import hf_polyattn as hp
from hf_polyattn.adaptation.fitting.interval import Intervals, ScoreRange
from hf_polyattn.adaptation.fitting.solves import exponential_fit
from hf_polyattn.patching.patched import patched_layers

LAYERS = 2
CLAMP_FREE = {spec: hp.PolyAttentionConfig(spec, clamp=False) for spec in ("poly4", "poly3^4-l1")}


def unclamped(model: Any) -> bool:
    return all(layer.config.clamp is False and layer.config.interval for _, layer in patched_layers(model))


@pytest.fixture(scope="module")
def texts(batch: Any) -> list[dict[str, Tensor]]:
    return [batch("minilm", 12, 64)]


@torch.no_grad()
def cosine(model: Any, inputs: dict[str, Tensor]) -> float:
    """Mean cosine of the hidden states to softmax's, of tokens that are not padding."""
    found = model(**inputs).last_hidden_state
    with hp.softmax_attention(model):
        expected = model(**inputs).last_hidden_state
    return float(torch.cosine_similarity(found, expected, -1)[inputs["attention_mask"].bool()].mean())


@pytest.mark.parametrize(("spec", "least"), [("poly4", 0.97), ("poly3^4-l1", 0.995)])
def test_a_fit_without_clamp_is_better_than_a_clamped_one_with_its_clamp_taken_off(
    spec: str, least: float, pretrained: Any, texts: list[dict[str, Tensor]]
) -> None:
    quality = {}
    for clamp in (False, None):
        model = hp.patch_model(
            pretrained("minilm", num_hidden_layers=LAYERS), hp.PolyAttentionConfig(spec, clamp=clamp)
        )
        hp.calibrate(model, texts, progress=False)
        for _, layer in patched_layers(model):
            layer.configure(hp.PolyAttentionConfig.from_dict(layer.config.to_dict() | {"clamp": False}))
        assert unclamped(model)
        quality[clamp] = cosine(model, texts[0])
    assert quality[False] > least
    assert quality[None] < quality[False]


def test_every_score_of_the_calibration_lies_in_the_interval(pretrained: Any, texts: list[dict[str, Tensor]]) -> None:
    model = hp.patch_model(pretrained("minilm", num_hidden_layers=LAYERS), CLAMP_FREE["poly4"])
    hp.calibrate(model, texts, progress=False)
    found = hp.diagnose(model, texts, progress=False)
    assert all(max(-low, high) <= 1.0 for layer in found.layers for low, high in layer.score_range)
    assert all(layer.below is not None and not any(layer.below) for layer in found.layers)
    assert "nothing clamps" not in found.verdict


def test_diagnose_says_how_far_scores_of_other_data_go(pretrained: Any, texts: list[dict[str, Tensor]]) -> None:
    model = pretrained("minilm", num_hidden_layers=LAYERS)
    hp.patch_model(model, CLAMP_FREE["poly4"])
    hp.calibrate(model, texts, progress=False)
    with torch.no_grad():
        attention = model.encoder.layer[1].attention.self
        attention.query.weight *= 3.0  # other data, for this layer
        attention.query.bias *= 3.0
    found = hp.diagnose(model, texts, progress=False)
    assert found.layers[1].far > 1.0 > found.layers[0].far
    assert f"nothing clamps the scores, and they go up to {found.layers[1].far:.2f} radii beyond" in found.verdict
    hp.patch_model(hp.unpatch_model(model), "poly4")
    hp.calibrate(model, texts, progress=False)
    assert hp.diagnose(model, texts, progress=False).layers[1].far == 0.0


@pytest.mark.parametrize("tool", ["convert", "anneal", "distill"])
def test_every_tool_leaves_the_clamp_away(tool: str, pretrained: Any, texts: list[dict[str, Tensor]]) -> None:
    model = hp.patch_model(pretrained("minilm", num_hidden_layers=2), CLAMP_FREE["poly4"])
    few = [{name: tensor[part, :24] for name, tensor in texts[0].items()} for part in (slice(0, 4), slice(4, 8))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if tool == "convert":
            hp.convert(model, few, specs=("poly4", "poly3^16-l1"), floor=0.5, progress=False)
        elif tool == "anneal":
            hp.anneal(model, few, ["poly6-l1", "poly4"], steps=1, progress=False)
        else:
            hp.calibrate(model, few, progress=False)
            hp.distill(model, few, steps=1, progress=False)
    assert unclamped(model)


def test_calibrate_says_where_a_polynomial_cannot_do_without(pretrained: Any, texts: list[dict[str, Tensor]]) -> None:
    model = pretrained("minilm", num_hidden_layers=LAYERS)
    hp.patch_model(model, hp.PolyAttentionConfig("poly1", clamp=False))
    with pytest.warns(UserWarning, match=r"without a clamp poly1 has to be right on every score.*poly3\^4-l1"):
        report = hp.calibrate(model, texts, progress=False)
    assert report.bad_layers
    assert report.needs_clamp in str(report)
    hp.patch_model(hp.unpatch_model(model), CLAMP_FREE["poly3^4-l1"])
    assert hp.calibrate(model, texts, progress=False).needs_clamp is None


# ---------------------------------------------------------------- the parts of a fit


def test_the_interval_of_a_polynomial_without_clamp_holds_all_scores() -> None:
    seen = random_rows()
    weight = seen.weight[:, 0].sum().item()
    for spec, candidates in (("poly3", 1), ("poly3^4-l1", 6)):
        ranges = ScoreRange(hp.Polynomial.parse(spec), HEADS, weight, CPU, clamp=False)
        ranges.see(seen, seen.scores)
        intervals = ranges.intervals()
        assert len(intervals) == candidates
        visible = (seen.visible * seen.weight.unsqueeze(-1)) > 0
        lowest = seen.scores.masked_fill(~visible, torch.inf).amin((0, 2, 3)).double()
        assert intervals.below is not None
        reached = intervals.tops - intervals.widths - intervals.below
        torch.testing.assert_close(reached, (lowest - 0.5).expand_as(reached))


def test_arguments_are_limited_by_a_clamp_only() -> None:
    edges = torch.tensor([[3.0]]).double(), torch.tensor([[2.0]]).double()
    scores = torch.tensor([-1.0, 1.0, 2.0, 4.0]).reshape(1, 1, 1, 4)
    assert Intervals(*edges).arguments(scores, 0).flatten().tolist() == [-1.0, -1.0, 0.0, 1.0]
    assert Intervals(*edges, clamp=False).arguments(scores, 0).flatten().tolist() == [-3.0, -1.0, 0.0, 2.0]


@pytest.mark.parametrize(("degree", "width", "below"), [(1, 1.0, 1.5), (3, 4.0, 6.0), (3, 2.0, 0.5), (4, 4.0, 8.0)])
def test_a_power_stays_small_below_its_interval(degree: int, width: float, below: float) -> None:
    t = torch.linspace(-1.0 - 2.0 * below / width, -1.0, 500, dtype=torch.float64)
    powers = t[:, None] ** torch.arange(degree + 1)
    bounded = (powers @ exponential_fit(degree, width, below)).abs().max()
    assert bounded <= 1.05 * torch.exp(torch.tensor(-width))
    free = (powers @ exponential_fit(degree, width)).abs().max()
    assert free > 1.05 * torch.exp(torch.tensor(-width)) or torch.isclose(free, bounded)
