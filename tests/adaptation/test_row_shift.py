"""The row shift of a fit, alone and against an answer that is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fitting_cases import CPU, DIM, HEADS, KEYS, SCALING, fitted, observation, parts, random_rows
from torch import Tensor

import hf_polyattn as hp
from hf_polyattn.adaptation.fitting.row_shift import Predictor, RowShift
from hf_polyattn.adaptation.fitting.rows import Rows, observed_rows
from hf_polyattn.patching.core import PolyAttention
from hf_polyattn.patching.row_shift import alpha_of
from hf_polyattn.spec import NORMALIZERS


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


LINEAR, CONSTANT = Predictor("linear"), Predictor("none")


def solved_shift(chunks: list[Rows], alpha: float = 0.0, predictor: Predictor = LINEAR) -> RowShift:
    shift = RowShift(HEADS, DIM, alpha, CPU)
    for chunk in chunks:
        shift.see(chunk)
    shift.solve(predictor)
    return shift


def planted(normalizer: str, noise: float = 0.0) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """Returns rows with lse_i − α log n_i = c + scaling · q_i·μ + noise, padding apart; μ, c, and that sum."""
    seen, mu, c = random_rows(), torch.randn(HEADS, DIM), torch.randn(HEADS)
    s = c[:, None] + SCALING * (seen.query @ mu.unsqueeze(-1)).squeeze(-1)
    s = s + noise * torch.randn(s.shape) + 50.0 * (1.0 - seen.weight)
    move = s + alpha_of(normalizer) * seen.count.log() - replace(seen, weight=torch.ones_like(s)).log_partition_sums()
    return replace(seen, scores=(seen.scores + move.unsqueeze(-1)) * seen.visible), mu, c, s


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_row_shift_recovers_a_planted_linear_shift(normalizer: str) -> None:
    seen, mu, c, s = planted(normalizer)
    shift = solved_shift(parts(seen), alpha_of(normalizer))
    real = seen.weight.bool()
    torch.testing.assert_close(shift.of(seen)[real], s[real], rtol=0, atol=1e-4)
    assert shift.count == 2 * 60 - 10
    assert shift.residual.max() < 1e-3
    child = PolyAttention(hp.PolyAttentionConfig("poly3", interval=True, key_shift=True), HEADS, DIM)
    top, radius = torch.rand(HEADS), 1.0 + torch.rand(HEADS)
    with torch.no_grad():
        shift.write(child, top, radius)
        torch.testing.assert_close(child.key_shift, mu, rtol=0, atol=1e-4)
        torch.testing.assert_close(child.center, c + top - radius, rtol=0, atol=1e-4)
        centers = child.shifted_center(seen.query, SCALING)
    torch.testing.assert_close(centers, shift.of(seen) + (top - radius)[:, None], rtol=0, atol=1e-5)

    constant = solved_shift([seen], alpha_of(normalizer), CONSTANT)
    of_heads = [s[:, head][real[:, head]] for head in range(HEADS)]
    torch.testing.assert_close(constant.residual.float(), torch.stack([own.std(correction=0) for own in of_heads]))
    torch.testing.assert_close(constant.of(seen)[0, :, 0], torch.stack([own.mean() for own in of_heads]))
    everything = solved_shift([replace(seen, weight=torch.ones_like(seen.weight))], alpha_of(normalizer))
    assert everything.residual.min() > 1.0  # the padding counts, and is far away


def planted_moments(normalizer: str) -> tuple[Rows, RowShift]:
    """Returns rows whose s_i is a function of their moments, number and query, and what was fitted to it."""
    seen = random_rows(400)
    mean, variance = seen.moments()
    query, log = SCALING * seen.query, seen.count.log()
    s = mean + variance / 2.0 + (1.0 - alpha_of(normalizer)) * log  # the prior
    s = s + 0.3 + 0.2 * mean * variance - 0.1 * variance**2 + 0.7 / seen.count
    s = s + (query @ torch.randn(HEADS, DIM, 1)).squeeze(-1) + log * (query @ torch.randn(HEADS, DIM, 1)).squeeze(-1)

    class Planted(RowShift):
        def target(self, rows: Rows) -> Tensor:
            return s

    shift = Planted(HEADS, DIM, alpha_of(normalizer), CPU)
    shift.see(seen)
    shift.solve(Predictor("moments"))
    return seen, shift


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_row_shift_recovers_planted_moments(normalizer: str) -> None:
    seen, shift = planted_moments(normalizer)
    real = seen.weight.bool()
    torch.testing.assert_close(shift.of(seen)[real], shift.target(seen)[real], rtol=0, atol=2e-3)
    assert shift.residual.max() < 2e-3 < 0.1 < shift.spread.min()
    config = hp.PolyAttentionConfig(hp.Polynomial(normalizer=normalizer), interval=True, row_shift="moments")  # type: ignore[arg-type]
    child = PolyAttention(config, HEADS, DIM)
    top, radius = torch.rand(HEADS), 1.0 + torch.rand(HEADS)
    with torch.no_grad():
        shift.write(child, top, radius)
        centers = child.centers_of(seen.query, seen.scores, seen.visible.bool(), SCALING)
    assert child.moments is not None
    assert child.moments.lengths.tolist() == [float(seen.count.min()), float(seen.count.max())]
    torch.testing.assert_close(centers[real], (shift.of(seen) + (top - radius)[:, None])[real], rtol=0, atol=1e-4)


def test_one_length_leaves_its_weights_to_the_prior() -> None:
    seen = random_rows(300)
    everything = replace(seen, visible=torch.ones_like(seen.visible), count=torch.full_like(seen.count, KEYS))
    shift = solved_shift([everything], 0.5, Predictor("moments"))
    child = PolyAttention(hp.PolyAttentionConfig("poly3", interval=True, row_shift="moments"), HEADS, DIM)
    with torch.no_grad():
        shift.write(child, torch.zeros(HEADS), torch.ones(HEADS))
        doubled = everything.scores.repeat(1, 1, 1, 2)
        once, twice = (
            child.centers_of(seen.query, x, torch.ones_like(x, dtype=torch.bool), SCALING)
            for x in (everything.scores, doubled)
        )
    expected = torch.full_like(once, 0.5 * torch.tensor(2.0).log())  # (1 − α) log 2, as of softmax
    torch.testing.assert_close(twice - once, expected, rtol=0, atol=1e-5)


def test_squares_find_the_directions_that_matter() -> None:
    seen = random_rows(2000)
    query = SCALING * seen.query
    u = torch.randn(HEADS, 2, DIM)

    class Planted(RowShift):
        def target(self, rows: Rows) -> Tensor:
            one, two = (query @ u.mT).square().unbind(-1)
            return 2.0 * one - 3.0 * two

    shift = Planted(HEADS, DIM, 0.5, CPU)
    shift.see(seen)
    shift.solve(Predictor("moments"))
    before = shift.residual
    directions = shift.directions(2)
    directions.see(seen)
    shift.take_squares(directions.solve())
    shift.see(seen)
    shift.solve(Predictor("moments", 2))
    assert (shift.residual < 0.35 * before).all()
    spanned = torch.linalg.svdvals(torch.cat([shift.squares, u], 1) / SCALING)  # of four vectors, two directions
    assert (spanned[:, 2] < 0.35 * spanned[:, 1]).all()


@pytest.mark.parametrize("row_shift", ["linear", "moments"])
@pytest.mark.parametrize("spec", ["poly3", "poly3~1", "poly4~2-l1"])
def test_centers_of_chosen_rows_are_those_of_the_module(spec: str, row_shift: str) -> None:
    seen = observation(spread=0.5)
    fit = fitted(spec, seen, row_shift=row_shift)
    fit.child.change_spec(fit.config.spec)
    fit.child.configure(replace(fit.config, interval=True, clamp=True))
    (all_rows,) = observed_rows("layer", seen, 1)
    with torch.no_grad():
        fit.write()
        whole = fit.child.row_centers(seen.query, seen.key, causal=True, scaling=SCALING)
        chosen = fit.child.centers_of(
            seen.query[:, :, ::3], all_rows.scores[:, :, ::3], all_rows.visible[:, :, ::3].bool(), SCALING
        )
    torch.testing.assert_close(whole[:, :, ::3], chosen, rtol=1e-4, atol=1e-4)
    assert (whole - fit.child.center[:, None]).abs().max() > 0.1


def test_residual_is_what_least_squares_leave() -> None:
    seen, _, _, s = planted("rsqrt", noise=0.3)
    shift = solved_shift(parts(seen), alpha_of("rsqrt"))
    for head in range(HEADS):
        real = seen.weight[:, head].bool()
        x = torch.cat([seen.query[:, head][real], torch.ones(int(real.sum()), 1)], -1).double()
        y = s[:, head][real].double()
        left = y - x @ torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
        assert float(shift.residual[head]) == pytest.approx(float(left.square().mean().sqrt()), rel=1e-4)
        assert 0.2 < shift.residual[head] < 0.4
