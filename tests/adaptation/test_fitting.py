"""The parts of a fit, each alone and against an answer that is known; `test_calibration.py` has them together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fitting_cases import CPU, GROUPS, HEADS, KEYS, SCALING, fitted, observation, parts, random_rows
from torch import Tensor

import hf_polyattn as hp
from hf_polyattn.adaptation.fitting import coefficients, interval, rows
from hf_polyattn.adaptation.fitting.coefficients import CoefficientFit, LinearFit, PowerFit, RatioFit, fit_of
from hf_polyattn.adaptation.fitting.errors import MeasuredErrors, comparable
from hf_polyattn.adaptation.fitting.interval import MARGIN, OUTLIERS, Intervals, ScoreRange, take
from hf_polyattn.adaptation.fitting.rows import Rows, observed_rows
from hf_polyattn.adaptation.fitting.solves import exponential_fit
from hf_polyattn.patching.row_shift import alpha_of


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------- rows


def test_rows_give_softmax_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = observation()
    (whole,) = observed_rows("layer", seen, 1)
    weights = (whole.scores - whole.log_partition_sums().unsqueeze(-1)).exp() * whole.visible
    out = whole.apply(weights) * whole.weight.unsqueeze(-1)
    torch.testing.assert_close(out, whole.target)
    assert not torch.allclose(whole.apply(weights), whole.target)  # padded rows have no target
    assert float(whole.weight[:, 0].sum()) == 2 * 40 - 9
    assert torch.equal(whole.count[0, 0], torch.arange(1.0, 41.0))
    monkeypatch.setattr(rows, "_CHUNK_SCORES", 1)
    apart = list(observed_rows("layer", seen, 3))
    assert len(apart) == 2
    torch.testing.assert_close(torch.cat([chunk.scores for chunk in apart]), whole.scores[:, :, ::3])


# ---------------------------------------------------------------- the interval


def test_the_top_is_above_the_largest_score_that_some_row_sees() -> None:
    seen, moved = random_rows(), torch.randn(2, HEADS, 60, KEYS)
    hidden = (seen.visible * seen.weight.unsqueeze(-1)) == 0.0
    far = replace(seen, scores=seen.scores.masked_fill(hidden, 1e3)), moved.masked_fill(hidden, 1e3)
    found = {}
    for name, (one, shifted) in {"seen": (seen, moved), "hidden": far, "open": far}.items():
        if name == "open":
            one = replace(one, visible=torch.ones_like(one.visible), weight=torch.ones_like(one.weight))
        score_range = ScoreRange(hp.Polynomial.parse("poly3"), HEADS, seen.weight[:, 0].sum().item(), CPU)
        score_range.see(one, shifted)
        found[name] = (score_range.intervals().tops[0], score_range.lowest, score_range.highest)
    top, lowest, highest = found["seen"]
    torch.testing.assert_close(top.float(), moved.masked_fill(hidden, -torch.inf).amax((0, 2, 3)) + MARGIN)
    torch.testing.assert_close(highest.float(), seen.scores.masked_fill(hidden, -torch.inf).amax((0, 2, 3)))
    torch.testing.assert_close(lowest.float(), seen.scores.masked_fill(hidden, torch.inf).amin((0, 2, 3)))
    assert all(torch.equal(*pair) for pair in zip(found["seen"], found["hidden"], strict=True))
    assert found["open"][0].min() == 1e3 + MARGIN


def test_an_interval_without_few_outliers_is_tried() -> None:
    scores = torch.randn(1, 4, 3000, 5)

    def tops(outliers: int, chunks: int = 1) -> Tensor:
        """Returns the tops that are tried, (2, heads), when so many rows have a key far above the others."""
        far = scores.clone()
        far[:, :, :outliers, 0] = 60.0
        score_range = ScoreRange(hp.Polynomial.parse("poly4-l1"), 4, 3000, CPU)
        for chunk in far.chunk(chunks, dim=2):
            row = torch.ones(1, 4, chunk.shape[2])
            query, value = row.unsqueeze(-1).expand(-1, -1, -1, 8), torch.ones(1, 4, 5, 8)
            seen = Rows(query, value, query, chunk, torch.ones_like(chunk), 5.0 * row, row, 1.0)
            score_range.see(seen, chunk)
        return score_range.intervals().tops[[0, -1]]

    usual, few, many = tops(0), tops(2), tops(300)
    assert (few[1] - usual[1]).abs().max() < 0.5
    assert (few[0] - usual[0]).min() > 40.0  # covers them
    assert (many - usual).min() > 40.0  # they are no outliers
    torch.testing.assert_close(tops(2, chunks=3), few)


@pytest.mark.parametrize(("spec", "tried"), [("poly4-l1", 2), ("poly3", 1), ("poly3^16-l1", 1)])
def test_outliers_are_left_out_only_where_a_row_sum_makes_up_for_them(spec: str, tried: int) -> None:
    score_range = ScoreRange(hp.Polynomial.parse(spec), HEADS, 1000, CPU)
    assert len(score_range.outliers) == tried
    seen = random_rows()
    score_range.see(seen, seen.scores)
    intervals = score_range.intervals()
    assert len(intervals) == tried * len(score_range.widths)
    pairs = zip(intervals.tops[:, 0].tolist(), intervals.widths[:, 0].tolist(), strict=True)
    assert len(set(pairs)) == len(intervals)


def test_arguments_are_limited_to_the_interval() -> None:
    intervals = Intervals(torch.tensor([[0.0], [3.0]]).double(), torch.tensor([[4.0], [2.0]]).double())
    scores = torch.tensor([[[[-9.0, -4.0, -2.0, 0.0, 2.0, 3.0, 9.0]]]])
    assert intervals.arguments(scores, 0).flatten().tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert intervals.arguments(scores, 1).flatten().tolist() == [-1.0, -1.0, -1.0, -1.0, 0.0, 1.0, 1.0]


# ---------------------------------------------------------------- coefficients

TOPS, WIDTHS = torch.tensor([2.0, 1.0, 4.0]).double(), torch.tensor([9.0, 2.5, 6.0]).double()
INTERVALS = Intervals(TOPS[:, None].expand(-1, HEADS), WIDTHS[:, None].expand(-1, HEADS))
PLANTED = 1  # the interval that the targets are made on


def polynomials(config: hp.PolyAttentionConfig) -> Tensor:
    """Returns positive polynomials on [−1, 1], (H, K), of which the largest coefficient is 1."""
    heads = HEADS if config.granularity == "head" else 1
    c = torch.rand(heads, config.spec.degree + 1).double() * 0.9 / config.spec.degree
    c[:, 0] = 1.0
    return c.expand(HEADS, -1)


def with_targets(seen: Rows, spec: hp.Polynomial, c: Tensor) -> Rows:
    """Returns rows whose targets are what the polynomials give on the planted interval."""
    t = INTERVALS.arguments(seen.scores, PLANTED).double()
    w = sum(c[:, k, None, None] * t**k for k in range(c.shape[1])) ** spec.power * seen.visible
    scale = 1.0 / w.sum(-1) if spec.normalizer == "l1" else seen.count.double() ** -alpha_of(spec.normalizer)
    value = seen.value.double().repeat_interleave(HEADS // GROUPS, 1)
    return replace(seen, target=((w @ value) * (scale * seen.weight).unsqueeze(-1)).float())


def run(fit: CoefficientFit, seen: Rows) -> list[str]:
    """Shows rows to a fit, in chunks, and returns the titles of its passes."""
    titles = []
    for title, see in fit.passes():
        titles.append(title)
        for chunk in parts(seen):
            see(chunk, chunk.scores)
    return titles


@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("spec", ["poly3", "poly2-mean", "poly4-none"])
def test_a_fixed_normalizer_recovers_a_planted_polynomial(spec: str, granularity: Any) -> None:
    config = hp.PolyAttentionConfig(spec, granularity=granularity)
    c = polynomials(config)
    seen = with_targets(random_rows(spread=3.0), config.spec, c)
    fit = fit_of(config, INTERVALS)
    assert isinstance(fit, LinearFit)
    assert run(fit, seen) == ["coefficients 1"]
    torch.testing.assert_close(fit.coefficients[PLANTED], c, rtol=0, atol=1e-3)
    share = fit.errors / fit.target.variance()
    assert share[PLANTED].abs().max() < 1e-6
    assert share[[0, 2]].min() > 1e-4  # on another interval it is no such polynomial
    if granularity == "layer":
        apart = with_targets(seen, config.spec, polynomials(hp.PolyAttentionConfig(spec)))
        run(unfit := LinearFit(config, INTERVALS), apart)
        assert (unfit.errors / unfit.target.variance())[PLANTED].max() > 1e-4  # one polynomial cannot be four


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_a_row_sum_recovers_a_planted_polynomial(granularity: Any) -> None:
    config = hp.PolyAttentionConfig("poly3-l1", granularity=granularity)
    c = polynomials(config)
    seen = with_targets(random_rows(spread=3.0), config.spec, c)
    fit = fit_of(config, INTERVALS)
    assert isinstance(fit, RatioFit)
    assert run(fit, seen) == ["coefficients 1", "intervals", "coefficients 2", "coefficients 3", "choice"]
    assert len(fit.intervals) == coefficients.RATIO_CANDIDATES
    assert torch.equal(fit.intervals.tops[0], INTERVALS.tops[PLANTED])  # the best one first
    torch.testing.assert_close(fit.coefficients[0], c, rtol=0, atol=1e-2)
    share = fit.errors / fit.target.variance()
    assert share[0].abs().max() < 1e-6
    assert share[1].min() > 1e-4
    run(linear := LinearFit(hp.PolyAttentionConfig("poly3-mean"), INTERVALS), seen)
    assert (linear.errors / linear.target.variance()).min() > 1e-4  # nothing else divides so


@pytest.mark.parametrize("spec", ["poly3^4", "poly3^4-l1"])
def test_a_power_is_exp_up_to_the_factor_that_fits(spec: str) -> None:
    config = hp.PolyAttentionConfig(spec)
    c = exponential_fit(3, float(WIDTHS[PLANTED]) / 4).expand(HEADS, -1) * torch.linspace(0.7, 1.3, HEADS)[:, None]
    seen = with_targets(random_rows(spread=3.0), config.spec, c)
    fit = fit_of(config, INTERVALS)
    assert isinstance(fit, PowerFit)
    assert run(fit, seen) == ["choice"]
    expected = c if spec == "poly3^4" else c / c.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(fit.coefficients[PLANTED], expected, rtol=1e-4, atol=0)
    share = fit.errors / fit.target.variance()
    assert share[PLANTED].abs().max() < 1e-6
    assert share[[0, 2]].min() > 1e-4


def test_exponential_fit_is_relative() -> None:
    """Its 16th power over 80 nats follows exp within the error that makes poly3^16-l1 lossless."""
    t = torch.linspace(-1.0, 1.0, 1001, dtype=torch.float64)
    fitted = exponential_fit(3, 80.0 / 16)
    p = sum(c * t**k for k, c in enumerate(fitted))
    error = (p / torch.exp((t - 1.0) * 2.5) - 1.0).abs()
    assert error.max() < 0.2
    assert (p > 0.0).all()
    looser = exponential_fit(1, 80.0 / 16)
    assert ((looser[0] + looser[1] * t) / torch.exp((t - 1.0) * 2.5) - 1.0).abs().max() > 0.5


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("spec", ["poly3", "poly2-none", "poly4-l1", "poly2^4", "poly2^4-l1"])
def test_measured_errors_are_those_of_the_operator(spec: str) -> None:
    """A causal layer whose scores are not shifted, so that the operator needs no key shift."""
    seen, polynomial = observation(), hp.Polynomial.parse(spec)
    c = torch.rand(len(INTERVALS), HEADS, polynomial.degree + 1).double()
    measured = MeasuredErrors(polynomial, INTERVALS, c)
    for chunk in observed_rows("layer", seen, 1):
        measured.see(chunk, chunk.scores)
    assert seen.real is not None
    real = seen.real[:, None, :, None]
    for candidate, found in enumerate(measured.errors()):
        radius = INTERVALS.widths[candidate] / 2.0
        out = hp.polynomial_attention(
            seen.query.double(), seen.key.double(), seen.value.double(), c[candidate],
            causal=True, scaling=SCALING, power=polynomial.power, normalizer=polynomial.normalizer,
            center=INTERVALS.tops[candidate] - radius, radius=radius, clamp=True, backend="reference",
        ).transpose(1, 2)  # fmt: skip
        expected = ((out - seen.output.transpose(1, 2)).square() * real).sum((0, 2, 3))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    spread = measured.errors().amax(0) / measured.errors().amin(0)
    assert spread.min() > 1.1


@pytest.mark.parametrize("spec", ["poly3", "poly3-l1", "poly2^4", "poly2^4-l1"])
def test_the_interval_with_the_smallest_measured_error_is_chosen(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a fit to each interval alone. Of the ratio fit one round, for more go on with two intervals only."""
    monkeypatch.setattr(coefficients, "RATIO_ROUNDS", 1)
    widths = "POWER_WIDTHS" if "^" in spec else "WIDTHS"
    seen, tried = observation(spread=2.0, length=200), getattr(interval, widths)
    monkeypatch.setattr(interval, "OUTLIERS", OUTLIERS[:1])
    together = fitted(spec, seen).report
    alone = []
    for width in tried:
        monkeypatch.setattr(interval, widths, (width,))
        alone.append(fitted(spec, seen).report.explained_variance)
    explained, best = torch.tensor(alone).max(0)
    torch.testing.assert_close(torch.tensor(together.explained_variance), explained)
    assert list(together.width) == [tried[index] for index in best]
    assert len(set(together.width)) > 1  # sharper heads want wider ones
    assert (explained - torch.tensor(alone).min(0).values).min() > 1e-3


def test_heads_choose_for_themselves_or_together() -> None:
    errors = torch.tensor([[1.0, 8.0], [3.0, 3.0], [9.0, 2.0]])
    for granularity, expected in (("head", [0, 2]), ("layer", [1, 1])):
        config = hp.PolyAttentionConfig("poly3", granularity=granularity)  # type: ignore[arg-type]
        best = comparable(errors, config).argmin(0, keepdim=True)
        assert best[0].tolist() == expected
        assert take(errors, best)[0].tolist() == [float(errors[c, head]) for head, c in enumerate(expected)]


@pytest.mark.parametrize(
    ("spec", "row_shift"),
    [
        *(("poly3", row_shift) for row_shift in ("none", "linear", "moments")),
        *((spec, "moments") for spec in ("poly4-l1", "poly3~2", "poly4~1-l1", "poly2^4~1")),
        ("poly3~1", "linear"),
    ],
)
def test_what_is_written_is_what_was_reported(spec: str, row_shift: str) -> None:
    seen = observation(spread=0.5)
    fit = fitted(spec, seen, row_shift=row_shift)
    before = {name: tensor.clone() for name, tensor in fit.child.state_dict().items()}
    initial = torch.tensor(fit.config.spec.initial_coefficients())
    assert torch.equal(before["coefficients"][0], initial)  # nothing before `write`
    fit.child.change_spec(fit.config.spec)
    fit.child.configure(replace(fit.config, interval=True, clamp=True))
    with torch.no_grad():
        fit.write()
    assert seen.real is not None
    real = seen.real[:, :, None, None]

    def explained() -> Tensor:
        with torch.no_grad():
            out = fit.child(seen.query, seen.key, seen.value, causal=True, scaling=SCALING)
        mean = (seen.output * real).sum((0, 1)) / real.sum()
        error, variance = (((x - seen.output) * real).double().square().sum((0, 1, 3)) for x in (out, mean))
        return 1.0 - error / variance

    reported = torch.tensor(fit.report.explained_variance).double()
    torch.testing.assert_close(explained(), reported, rtol=0, atol=1e-4)
    fit.child.load_state_dict(before, strict=False)
    assert (explained() - reported).abs().min() > 1e-2
