"""Each arm of the adaptation study is what its name says. Its figures are in benchmarks/adaptation.json."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import adaptation_study as arms
import pytest
import quality
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_polyattn as hp
from hf_polyattn.adaptation.capture import Replay
from hf_polyattn.patching.core import PolyAttention
from hf_polyattn.patching.patched import patched_layers


@pytest.fixture(scope="module")
def case(checkpoint: Callable[[str], Path], shared: Callable[[str], Path]) -> quality.Case:
    """gpt2-zinc, with 64 molecules to fit to and 64 others that are held out."""
    folder, _ = checkpoint("gpt2-zinc"), shared("datasets/zinc/train.parquet")
    batches = quality.molecules(folder, 192).batches  # `study` trains on the first ones, here for two steps
    return quality.language_model(folder, batches[:1], batches[2:])


@pytest.fixture(scope="module")
def calibrated(case: quality.Case) -> PreTrainedModel:
    model = hp.patch_model(copy.deepcopy(case.model), "poly3")
    arms.calibrated(model, case.batches)
    return model


@pytest.fixture
def model(calibrated: PreTrainedModel) -> PreTrainedModel:
    """Patched and calibrated."""
    return copy.deepcopy(calibrated)


def logits(model: PreTrainedModel, case: quality.Case) -> Tensor:
    with torch.no_grad():
        return model(**case.batches[0]).logits[case.batches[0]["attention_mask"].bool()]


def changed(model: PreTrainedModel, before: PreTrainedModel) -> set[str]:
    old = before.state_dict()
    return {name for name, tensor in model.state_dict().items() if not torch.allclose(tensor, old[name], atol=1e-4)}


def test_sequential_fits_each_layer_on_what_the_polynomials_before_it_make(
    case: quality.Case, model: PreTrainedModel
) -> None:
    student = hp.patch_model(copy.deepcopy(case.model), "poly3")
    arms.sequential(student, case.batches)
    of_fit = {name.split(".")[2] for name in changed(student, model)}
    assert of_fit == {"1", "2", "3"}  # the first layer has no polynomial before it

    path, child = patched_layers(student)[-1]
    queries: list[Tensor] = []
    handle = child.register_forward_hook(lambda _, qkv, out: queries.append(qkv[0]))
    logits(student, case)
    handle.remove()
    seen = arms.own_inputs(student, path, child, case.batches).kept
    assert seen is not None
    torch.testing.assert_close(seen[0][2].query, queries[0])
    teacher = Replay(student, case.batches, progress=False)
    teacher.run(lambda *_: None, "control")
    assert teacher.kept is not None
    assert (teacher.kept[-1][2].query - queries[0]).abs().max() > 0.1


@pytest.mark.parametrize("start", [arms.refitted, partial(arms.sequential, refit=True)], ids=["all", "sequential"])
def test_refit_changes_output_projections_and_helps_held_out_data(
    case: quality.Case, model: PreTrainedModel, start: Callable[..., None]
) -> None:
    student = hp.patch_model(copy.deepcopy(case.model), "poly3")
    start(student, case.batches)
    weights = {name for name in changed(student, model) if "polyattn" not in name}
    assert weights == {f"transformer.h.{n}.attn.c_proj.{part}" for n in range(4) for part in ("weight", "bias")}
    assert case.measure(student)["nll"] < case.measure(model)["nll"]


def test_chebyshev_is_the_same_polynomial_and_takes_another_step(case: quality.Case, model: PreTrainedModel) -> None:
    before, plain = logits(model, case), copy.deepcopy(model)
    with arms.in_chebyshev(model, 1):
        torch.testing.assert_close(logits(model, case), before, atol=1e-4, rtol=1e-4)
    assert all(type(child) is PolyAttention for _, child in patched_layers(model))
    assert model.state_dict().keys() == plain.state_dict().keys()

    arms.adapt(model, case.model, case.batches, arms.in_chebyshev, 1e-5)
    arms.adapt(plain, case.model, case.batches, arms.in_powers, 1e-5)
    assert {name.split(".")[-1] for name in changed(model, plain)} == {"delta", "directions"}


def test_blend_goes_from_softmax_to_the_polynomial(case: quality.Case, model: PreTrainedModel) -> None:
    polynomial, softmax = logits(model, case), logits(case.model, case)
    distance = (polynomial - softmax).norm()
    with arms.blended(model, 4) as groups:
        assert 0.0 < (logits(model, case) - softmax).norm() < 0.2 * distance
        loss = model(**case.batches[0], labels=case.batches[0]["input_ids"]).loss
        assert all(logit.grad is None for logit in groups[0]["params"])
        loss.backward()
        assert all(logit.grad.abs().min() > 0.0 for logit in groups[0]["params"])
        torch.testing.assert_close(logits(model, case), polynomial)
    torch.testing.assert_close(logits(model, case), polynomial)
    with arms.blended(model, 4) as groups, torch.no_grad():
        for logit in groups[0]["params"]:
            logit.fill_(-50.0)
        torch.testing.assert_close(logits(model, case), softmax, atol=1e-4, rtol=1e-4)


def test_study_measures_every_arm_as_a_polynomial(case: quality.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quality.CASES, "gpt2-zinc", lambda: case)
    monkeypatch.setattr(arms, "SPECS", arms.SPECS[:1])
    table = [*arms.study("gpt2-zinc", ["direct", "blend"], steps=2, seeds=1)][-1]
    softmax, found = table["softmax"]["nll"], table["poly3"]
    assert softmax < found["direct"]["nll"] == found["blend"]["nll"] < 1.1 * softmax
    assert softmax < min(found["direct"]["trained"] + found["blend"]["trained"])
    assert case.measure(case.model)["nll"] == softmax  # the teacher is as it was


def test_the_json_has_every_arm() -> None:
    for name, table in json.loads(arms.RESULTS.read_text())["checkpoints"].items():
        assert table["poly3"].keys() == arms.ARMS.keys(), name
