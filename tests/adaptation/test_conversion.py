"""Specs that differ from layer to layer, chosen by hand or by `convert`, on real checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_polyattn as hp
from hf_polyattn.adaptation.conversion import cost
from hf_polyattn.patching.patched import patched_layers, spec_of
from hf_polyattn.spec import Polynomial

Batch = dict[str, Tensor]
DIAL = ("poly3", "poly4-l1", "poly3^16-l1")


@pytest.fixture(scope="module")
def batches(told: Callable[[int], Tensor]) -> list[Batch]:
    """Stories that the checkpoint itself tells."""
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in told(16).split(4)]


def specs_of(model: PreTrainedModel) -> list[str]:
    return [str(child.config.spec) for _, child in patched_layers(model)]


def test_layers_may_have_specs_of_their_own(llama: PreTrainedModel, batches: list[Batch], tmp_path: Path) -> None:
    config = hp.PolyAttentionConfig("poly3^16-l1", layer_specs={1: "poly6-l1", 4: "poly2"})
    hp.patch_model(llama, config)
    expected = ["poly3^16-l1", "poly6-l1", "poly3^16-l1", "poly3^16-l1", "poly2"]
    assert specs_of(llama) == expected
    assert spec_of(llama) == ", ".join(expected)
    assert [row[5] for row in hp.describe(llama).rows] == expected
    hp.calibrate(llama, batches, progress=False)
    hp.patch_model(llama, config)  # the same again
    with pytest.raises(hp.PatchError, match=r"layers\.1\.self_attn' with poly6-l1; asked for poly3\^16-l1"):
        hp.patch_model(llama, "poly3^16-l1")

    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert specs_of(loaded) == expected
    with torch.no_grad():
        assert torch.equal(loaded(**batches[0]).logits, llama(**batches[0]).logits)
    hp.unpatch_model(llama)
    assert not hasattr(llama.config, "polyattn_config")


def test_specs_of_layers_that_do_not_exist_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(hp.PatchError, match=r"no attention in layers \[7\]"):
        hp.patch_model(llama, hp.PolyAttentionConfig("poly3", layer_specs={7: "poly6-l1"}))
    assert not hp.is_patched(llama)


@pytest.mark.parametrize("wrong", [{"first": "poly3"}, {-1: "poly3"}, [1, 2], "poly3", {0: "poly3", "0": "poly4"}])
def test_wrong_layer_specs_are_refused(wrong: Any) -> None:
    with pytest.raises(hp.SpecError, match="layer_specs must map layer indices to specs"):
        hp.PolyAttentionConfig("poly3", layer_specs=wrong)


def test_calibration_can_change_the_spec(llama: PreTrainedModel, batches: list[Batch], tmp_path: Path) -> None:
    hp.patch_model(llama, "poly3")
    bare = hp.similarity(llama, batches[:1])
    assert hp.calibrate(llama, batches, spec="poly3^16-l1", progress=False).spec == "poly3^16-l1"
    assert hp.similarity(llama, batches[:1]) > 0.9999 > 0.99 > bare
    llama.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "config.json").read_text())["polyattn_config"]
    assert state["spec"] == "poly3^16-l1"
    assert set(state["modules"].values()) == {"poly3^16-l1"}


def test_convert_chooses_for_every_layer(llama: PreTrainedModel, batches: list[Batch], tmp_path: Path) -> None:
    hp.patch_model(llama, "poly3")
    report = hp.convert(llama, batches, floor=0.9992, specs=DIAL, progress=False)
    assert specs_of(llama) == list(report.chosen.specs.values())
    assert report.chosen.quality >= 0.9992
    assert hp.similarity(llama, batches[-1:]) == pytest.approx(report.chosen.quality, abs=1e-6)
    assert len(set(report.chosen.specs.values())) > 1  # the layers differ, or the test proves nothing
    lossless = report.uniform[-1]
    assert report.chosen.cost < lossless.cost == cost(Polynomial.parse("poly3^16-l1"))
    assert report.uniform[0].quality < 0.9992 < lossless.quality
    cheaper = [point for point in (*report.uniform, *report.mixed) if point.cost < report.chosen.cost]
    assert cheaper
    assert all(point.quality < 0.9992 for point in cheaper)
    assert "chosen, layer by layer" in str(report)
    report.plot(tmp_path / "dial.png")
    assert [file.name for file in tmp_path.iterdir()] == ["dial.png"]
    assert json.loads(json.dumps(report.to_dict()))["floor"] == 0.9992


def test_convert_uses_the_quality_it_is_given(llama: PreTrainedModel, batches: list[Batch]) -> None:
    hp.patch_model(llama, "poly3")

    def layers_of_two(model: Any) -> float:
        """High as long as two layers are costly."""
        return float(sum(spec == "poly3^16-l1" for spec in specs_of(model)))

    report = hp.convert(
        llama, batches, floor=2.0, specs=("poly3", "poly3^16-l1"), quality=layers_of_two, progress=False
    )
    assert report.chosen.quality >= 2.0


def test_a_floor_out_of_reach_is_an_error(llama: PreTrainedModel, batches: list[Batch]) -> None:
    hp.patch_model(llama, "poly3")
    with pytest.raises(hp.QualityError, match=r"poly4-l1 in every layer has quality 0\.\d+, below the floor of 0.9999"):
        hp.convert(llama, batches, floor=0.9999, specs=("poly3", "poly4-l1"), progress=False)


def test_convert_names_what_is_missing(llama: PreTrainedModel, batches: list[Batch]) -> None:
    with pytest.raises(hp.PatchError, match="is not patched"):
        hp.convert(llama, batches)
    hp.patch_model(llama, "poly3")
    with pytest.raises(hp.InputError, match="at least two specs and two batches, got 7 and 1"):
        hp.convert(llama, batches[:1])
