"""Each arm of the studies of the row shift is what its name says. Their figures are in benchmarks/."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import quality
import row_shift_study as arms
import row_shift_training as training
import torch
from fitting_cases import CPU, DIM, HEADS, random_rows
from torch import Tensor

import hf_polyattn as hp
from hf_polyattn.adaptation.fitting.interval import Intervals
from hf_polyattn.adaptation.fitting.refinement import FittedRefinement
from hf_polyattn.adaptation.fitting.row_shift import Predictor, RowShift
from hf_polyattn.adaptation.fitting.rows import Rows
from hf_polyattn.patching.core import is_patched
from hf_polyattn.patching.patched import patched_layers


@pytest.fixture(scope="module")
def case(checkpoint: Callable[[str], Path], shared: Callable[[str], Path]) -> quality.Case:
    """llama-stories260K, with 8 pieces of 32 tokens to fit to and 8 others that are held out."""
    folder, _ = checkpoint("llama"), shared("datasets/tinystories/train.parquet")
    blocks = quality.stories(folder, start=1, count=16).batches
    fitted, held_out = ([{name: tensor[:, :32] for name, tensor in block.items()}] for block in blocks)
    return quality.language_model(folder, fitted, held_out)


def solved(kind: type[RowShift], seen: Rows) -> RowShift:
    shift = kind(HEADS, DIM, 0.5, CPU)
    shift.see(seen)
    shift.solve(Predictor("moments"))
    return shift


def test_unchanged_is_what_the_library_computes(case: quality.Case) -> None:
    library = quality.calibrated(case, "poly3")["nll"]
    found = {name: arms.measured(case, "poly3", arms.ARMS["poly3"][name]) for name in ("unchanged", "third-moments")}
    assert found["unchanged"]["nll"] == pytest.approx(library, abs=2e-6)
    assert abs(found["third-moments"]["nll"] - library) > 1e-4
    assert 0.0 < found["unchanged"]["above"] < 0.01 < found["unchanged"]["below"] < 1.0
    assert not is_patched(case.model)


def refined(kind: type[FittedRefinement], seen: Rows, shift: RowShift) -> FittedRefinement:
    interval = Intervals(torch.full((1, HEADS), 3.0), torch.full((1, HEADS), 10.0))
    exponential = torch.tensor([0.08, 0.3, 1.2, 1.4]).double().expand(HEADS, 4)  # roughly, on that interval
    fit = kind(hp.Polynomial.parse("poly3"), interval, exponential, shift)
    shifted = seen.scores - shift.of(seen).unsqueeze(-1)
    fit.see(seen, shifted)
    fit.solve()
    return fit


def test_a_step_of_degree_4_is_the_librarys_and_others_take_more_away() -> None:
    torch.manual_seed(0)
    seen = random_rows(400)
    shift = solved(RowShift, seen)
    library = refined(FittedRefinement, seen, shift)
    torch.testing.assert_close(refined(arms.of_degree(4), seen, shift).steps, library.steps)
    assert (refined(arms.of_degree(1), seen, shift).residual > library.residual).all()
    assert (refined(arms.WithVariance, seen, shift).residual < library.residual).all()

    class Chebyshev4(arms.Chebyshev):
        degree = 4

    found, shifted = refined(Chebyshev4, seen, shift), seen.scores - shift.of(seen).unsqueeze(-1)
    torch.testing.assert_close(found.of(seen, shifted), library.of(seen, shifted), rtol=0, atol=1e-3)
    assert (found.steps - library.steps).abs().max() > 0.1


@pytest.mark.parametrize("kind", [arms.ThirdMoment, arms.ThirdMoments])
def test_third_moments_are_learned(kind: type[RowShift]) -> None:
    torch.manual_seed(0)
    seen = random_rows(400)
    hidden = seen.visible.expand_as(seen.scores) == 0.0
    left = seen.scores - seen.moments()[0].unsqueeze(-1)
    planted = 0.3 * left.pow(3).masked_fill(hidden, 0.0).sum(-1) / seen.count

    def residual(kind: type[RowShift]) -> Tensor:
        class Planted(kind):  # type: ignore[misc, valid-type]
            def target(self, rows: Rows) -> Tensor:
                return planted

        return solved(Planted, seen).residual

    assert residual(kind).max() < 0.05 * residual(RowShift).min()


def test_a_width_keeps_the_place_of_weight_one_and_scales_the_rest() -> None:
    seen = random_rows(60)
    fit = arms.StudyFit.__new__(arms.StudyFit)
    fit.shift = solved(RowShift, seen)
    top = 0.5 * seen.count.log().unsqueeze(-1).expand(-1, HEADS, -1, 1)
    widths = arms.width_by(0.5)(fit, seen, top - 1.0)
    place = 2 * DIM + arms.FEATURES.index("v")
    relative = seen.moments()[1] / fit.shift._mean[:, place, None]
    expected = 1.0 / relative.sqrt().clamp(0.5, 2.0)
    torch.testing.assert_close((top - widths).squeeze(-1).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(arms.width_by(0.5)(fit, seen, top), top)


def test_a_fixed_shift_stays_in_distillation(case: quality.Case) -> None:
    models = {}
    for name in ("calibrated", "distill", "distill-fixed-shift"):
        models[name] = copy.deepcopy(case.model)
        training.ARMS[name](models[name], case.batches, case.batches, "poly3", 1e-4)
    start, free, fixed = (patched_layers(model)[0][1].state_dict() for model in models.values())

    def changed(after: dict[str, Tensor]) -> set[str]:
        return {name for name in start if not torch.equal(start[name], after[name])}

    assert changed(fixed) == {"delta"}
    assert {"moments.weights", "key_shift"} <= changed(free)


def test_the_files_have_every_arm() -> None:
    for name, table in json.loads(arms.RESULTS.read_text())["checkpoints"].items():
        for spec, expected in arms.ARMS.items():
            assert {"library", *(arms.FEW & expected.keys())} <= table[spec].keys() <= {"library", *expected}, name
            assert table[spec]["unchanged"] == pytest.approx(
                {**table[spec]["unchanged"], **table[spec]["library"]}, 1e-4
            )
    for name, table in json.loads(training.RESULTS.read_text())["checkpoints"].items():
        assert all(table[spec].keys() == training.ARMS.keys() for spec in training.SPECS), name
