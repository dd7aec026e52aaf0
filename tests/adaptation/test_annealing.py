"""The ways down the dial, on real checkpoints: alignment, matching by layer, the ladder, and a cut-off training."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_polyattn as hp
from hf_polyattn.adaptation.alignment import residual
from hf_polyattn.adaptation.capture import Observation, observe
from hf_polyattn.adaptation.fitting import row_shift as fitting
from hf_polyattn.patching.patched import patched_layers, spec_of

Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def batches(told: Callable[[int], Tensor]) -> list[Batch]:
    """Stories that the checkpoint itself tells; the second half of each batch is padded on the left."""
    stories = told(24)
    mask = torch.ones_like(stories)
    mask[1::2, :20] = 0
    return [
        {"input_ids": part, "attention_mask": seen} for part, seen in zip(stories.split(4), mask.split(4), strict=True)
    ]


# ---------------------------------------------------------------- alignment


def calibrated_residuals(model: PreTrainedModel, batches: list[Batch]) -> list[float]:
    report = hp.calibrate(model, batches, row_shift="linear", progress=False)
    return [sum(layer.residual) / len(layer.residual) for layer in report.layers]


@pytest.mark.parametrize("row_shift", ["linear", "moments"])
def test_residual_is_the_one_that_calibration_reports(
    row_shift: Any, llama: PreTrainedModel, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "RIDGES", (1e-6,))  # calibration takes a larger one where rows held out want it
    hp.patch_model(llama, hp.PolyAttentionConfig("poly3", row_shift=row_shift))
    found: dict[str, float] = {}

    def observer(path: str, child: Any, seen: Observation) -> None:
        found[path] = float(residual(seen, child.config))

    observe(llama, batches[:1], observer, progress=False)
    for layer in hp.calibrate(llama, batches[:1], row_shift=row_shift, progress=False).layers:
        squares = [value**2 for value in layer.residual]
        assert found[layer.path] == pytest.approx(sum(squares) / len(squares), rel=0.01)


def test_alignment_lowers_the_residual_and_keeps_softmax(llama: PreTrainedModel, batches: list[Batch]) -> None:
    original = copy.deepcopy(llama)
    losses = {}
    for penalty in (0.0, 0.3):
        config = hp.PolyAttentionConfig("poly3", row_shift="linear")  # moments leave little to align
        model = hp.patch_model(copy.deepcopy(original), config)
        polynomials = [p.detach().clone() for _, child in patched_layers(model) for p in child.parameters()]
        report = hp.align(model, batches[:4], steps=30, penalty=penalty, lr=1e-3, progress=False)
        assert len(report.losses) == 30
        after = [p for _, child in patched_layers(model) for p in child.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(after, polynomials, strict=True))
        assert all(child.delta.requires_grad for _, child in patched_layers(model))
        with hp.softmax_attention(model), torch.no_grad():
            softmax, target = (m(**batches[5]).logits[::2] for m in (model, original))
        assert torch.cosine_similarity(softmax, target, dim=-1).mean() > 0.97
        residuals = calibrated_residuals(model, batches[:4])
        losses[penalty] = sum(residuals) / len(residuals), hp.similarity(model, batches[5:], original)
    assert losses[0.3][0] < 0.7 * losses[0.0][0]
    assert losses[0.3][1] > losses[0.0][1] + 0.01


def test_alignment_is_refused_where_it_means_nothing(llama: PreTrainedModel, batches: list[Batch]) -> None:
    with pytest.raises(hp.PatchError, match="is not patched"):
        hp.align(llama, batches, steps=1)
    hp.patch_model(llama, "poly3-l1")
    with pytest.raises(hp.PatchError, match="the teacher is patched"):
        hp.align(llama, batches, steps=1, teacher=llama)
    with pytest.raises(hp.InputError, match="poly3-l1 divides by its row sums and needs no alignment"):
        hp.align(llama, batches, steps=1)


# ---------------------------------------------------------------- layer by layer


def test_matching_layers_goes_on_where_calibration_ends(llama: PreTrainedModel, batches: list[Batch]) -> None:
    hp.patch_model(llama, "poly3")
    hp.calibrate(llama, batches[:4], progress=False)
    before, weights = hp.similarity(llama, batches[5:]), copy.deepcopy(llama.state_dict())
    losses = hp.match_layers(llama, batches[:4], steps=20, progress=False)
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])
    assert hp.similarity(llama, batches[5:]) > before + 0.005
    changed = {name for name, tensor in llama.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed
    assert all(".polyattn." in name for name in changed)


@pytest.mark.parametrize("config", [hp.PolyAttentionConfig("poly3", learnable=False), "poly3-l1"], ids=["frozen", "l1"])
def test_polynomials_that_cannot_be_matched_are_named(
    llama: PreTrainedModel, batches: list[Batch], config: Any
) -> None:
    hp.patch_model(llama, config)
    with pytest.raises(hp.InputError, match=r"poly3.*: no polynomial can be matched"):
        hp.match_layers(llama, batches, steps=1)


def test_layers_with_row_sums_are_left_alone(llama: PreTrainedModel, batches: list[Batch]) -> None:
    hp.patch_model(llama, hp.PolyAttentionConfig("poly3", layer_specs={1: "poly4-l1"}))
    hp.calibrate(llama, batches, progress=False)
    before = copy.deepcopy(llama.state_dict())
    hp.distill(llama, batches, steps=1, layer_steps=2, lr=0.0, progress=False)
    changed = {name for name, tensor in llama.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[2] for name in changed} == {"0", "2", "3", "4"}


# ---------------------------------------------------------------- the ladder


def test_annealing_reaches_the_last_rung(llama: PreTrainedModel, batches: list[Batch]) -> None:
    hp.patch_model(llama, "poly3^16-l1")
    report = hp.anneal(llama, batches, ["poly4-l1", "poly3"], steps=12, tolerance=0.0, layers_at_once=3, progress=False)
    assert spec_of(llama) == "poly3"
    assert [(rung.spec, rung.steps) for rung in report.rungs] == [("poly4-l1", 12), ("poly3", 12)]
    last = report.rungs[-1]
    assert last.quality > last.calibrated_quality
    assert report.rungs[0].quality > last.quality
    assert "quality trained" in str(report)


def test_a_rung_within_tolerance_ends_early(llama: PreTrainedModel, batches: list[Batch]) -> None:
    hp.patch_model(llama, "poly3^16-l1")
    report = hp.anneal(llama, batches, ["poly3^16-l1"], steps=40, tolerance=0.5, progress=False)
    assert report.rungs[0].steps == 10


def test_annealing_stops_above_the_floor(llama: PreTrainedModel, batches: list[Batch]) -> None:
    hp.patch_model(llama, "poly3^16-l1")
    hp.calibrate(llama, batches, progress=False)
    report = hp.anneal(
        llama, batches, ["poly3^8-l1", "poly2-l1", "poly1"], steps=2, floor=0.99, lr=1e-5, progress=False
    )
    assert report.stopped_at == "poly2-l1"
    assert spec_of(llama) == "poly3^8-l1"
    assert llama.config.polyattn_config["spec"] == "poly3^8-l1"
    assert hp.similarity(llama, batches[:2]) > 0.99 > report.rungs[-1].quality
    assert "poly2-l1 falls below the floor" in str(report)


def test_annealing_names_what_is_missing(llama: PreTrainedModel, batches: list[Batch]) -> None:
    with pytest.raises(hp.PatchError, match="is not patched"):
        hp.anneal(llama, batches, ["poly3"], steps=1)
    hp.patch_model(llama, "poly3")
    with pytest.raises(hp.InputError, match="at least one spec and one step a rung, got 0 and 1"):
        hp.anneal(llama, batches, [], steps=1)


# ---------------------------------------------------------------- cut off and resumed

TRAINING = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
import hf_polyattn as hp
torch.set_num_threads(1)
checkpoint, state, result, lr = sys.argv[1:]
model = hp.patch_model(AutoModelForCausalLM.from_pretrained(checkpoint), "poly3")
tokens = torch.randint(3, 500, (6, 2, 24), generator=torch.Generator().manual_seed(0))
class Batches:
    def __iter__(self):
        for ids in tokens:
            print("batch", flush=True)
            yield {"input_ids": ids}
hp.calibrate(model, [{"input_ids": ids} for ids in tokens], progress=False)
report = hp.distill(
    model, Batches(), steps=15, layer_steps=2, lr=float(lr), checkpoint=state or None, checkpoint_every=4,
    progress=False,
)
torch.save({"weights": model.state_dict(), "losses": report.losses}, result)
"""


def test_a_killed_training_goes_on_to_the_bit(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    state = tmp_path / "state.pt"

    def command(name: str, state: str | Path, lr: str = "1e-3") -> list[str]:
        return [sys.executable, "-c", TRAINING, str(checkpoint("llama")), str(state), str(tmp_path / name), lr]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command("cut", state), stdout=subprocess.PIPE, env=environment) as cut:
        assert cut.stdout is not None
        for _ in range(2 + 10):  # those of the layers, then ten of fifteen
            assert cut.stdout.readline()
        cut.send_signal(signal.SIGKILL)
    assert not (tmp_path / "cut").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]

    other = subprocess.run(
        command("other", state, "2e-3"), capture_output=True, text=True, env=environment, check=False
    )
    assert "state.pt is of another training: lr was 0.001 and is now 0.002" in other.stderr
    for name, file in (("resumed", state), ("unbroken", "")):
        subprocess.run(command(name, file), check=True, capture_output=True, env=environment)
    resumed, unbroken = (torch.load(tmp_path / name) for name in ("resumed", "unbroken"))
    assert resumed["losses"] == unbroken["losses"]
    assert len(set(unbroken["losses"])) == 15
    assert all(torch.equal(tensor, unbroken["weights"][name]) for name, tensor in resumed["weights"].items())
    assert not state.exists()


def test_a_broken_state_is_refused(llama: PreTrainedModel, batches: list[Batch], tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 cut")
    hp.patch_model(llama, "poly3")
    with pytest.raises(hp.InputError, match=r"state\.pt is not the state of a training .* remove it to begin anew"):
        hp.distill(llama, batches, steps=2, checkpoint=tmp_path / "state.pt", progress=False)
