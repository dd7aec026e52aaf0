"""What is given as batches and as specs: one in place of several is named as what it is."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel

import hf_polyattn as hp
from hf_polyattn.errors import InputError, PolyAttnError, SpecError

OF_BATCHES = {
    "calibrate": lambda model, batches: hp.calibrate(model, batches, progress=False),
    "match_layers": lambda model, batches: hp.match_layers(model, batches, steps=1, progress=False),
    "distill": lambda model, batches: hp.distill(model, batches, steps=1, progress=False),
    "align": lambda model, batches: hp.align(model, batches, steps=1, progress=False),
    "anneal": lambda model, batches: hp.anneal(model, batches, ["poly3"], steps=1, progress=False),
    "convert": lambda model, batches: hp.convert(model, batches, progress=False),
    "similarity": lambda model, batches: hp.similarity(model, batches),
    "diagnose": lambda model, batches: hp.diagnose(model, batches, progress=False),
    "heads": lambda model, batches: hp.plot.heads(model, batches=batches),
}


@pytest.mark.parametrize("way", OF_BATCHES)
def test_a_single_batch_is_not_taken_for_several(way: str, llama: PreTrainedModel, batch: Any) -> None:
    model, inputs = hp.patch_model(llama, "poly3"), batch("llama")
    for single in (dict(inputs), BatchEncoding(dict(inputs)), inputs["input_ids"]):
        with pytest.raises(InputError, match=rf"a single batch was given, a {type(single).__name__}.*wrap it: \[batch"):
            OF_BATCHES[way](model, single)


@pytest.mark.parametrize("way", ["distill", "align"])
def test_a_training_names_a_batch_that_is_no_mapping(way: str, llama: PreTrainedModel, batch: Any) -> None:
    ids: Tensor = batch("llama")["input_ids"]
    with pytest.raises(InputError, match=r"a batch must be a mapping of model inputs.*got Tensor"):
        OF_BATCHES[way](hp.patch_model(llama, "poly3"), [ids])


def test_a_single_spec_is_not_taken_for_several(llama: PreTrainedModel, batch: Any) -> None:
    model, batches = hp.patch_model(llama, "poly3"), [batch("llama")] * 2
    for single in ("poly3", hp.Polynomial()):
        with pytest.raises(SpecError, match=r"a single spec was given, 'poly3'.*wrap it: \[spec\]"):
            hp.convert(model, batches, specs=single, progress=False)  # type: ignore[arg-type]
        with pytest.raises(SpecError, match="a single spec"):
            hp.anneal(model, batches, single, steps=1, progress=False)  # type: ignore[arg-type]


def test_whoever_patches_again_is_told_what_differs(llama: PreTrainedModel) -> None:
    model = hp.patch_model(llama, "poly3", layers=[0])
    with pytest.raises(PolyAttnError, match=r"with poly3 and layers=\(0,\); asked for poly3 and layers=None\."):
        hp.patch_model(model, "poly3")
    with pytest.raises(PolyAttnError, match=r"with poly3; asked for poly6-l1\."):
        hp.patch_model(model, "poly6-l1", layers=[0])
    with pytest.raises(PolyAttnError, match=r"learnable=True; asked for poly3 and learnable=False\."):
        hp.patch_model(model, hp.PolyAttentionConfig("poly3", layers=[0], learnable=False))
    hp.patch_model(model, "poly3", layers=[0])


@pytest.mark.parametrize("way", ["calibrate", "diagnose", "similarity"])
def test_every_module_keeps_its_mode(way: str, llama: PreTrainedModel, batch: Any) -> None:
    model = hp.patch_model(llama, "poly3").train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    OF_BATCHES[way](model, [batch("llama")])
    assert {name: module.training for name, module in model.named_modules()} == before
