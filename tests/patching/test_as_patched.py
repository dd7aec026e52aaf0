"""Whether weights are those that were patched, and polynomials fitted to them: said where a result depends on it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_polyattn as hp
from hf_polyattn.patching.as_patched import weights_changed


@pytest.fixture
def softmax(pretrained: Any) -> Any:
    return pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=2)


@pytest.fixture
def batches(batch: Any) -> list[dict[str, Tensor]]:
    return [batch("llama")]


def said(call: Any, about: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if about in str(warning.message)]


def trained(model: Any, batches: Any, steps: int = 1) -> Any:
    """A loop of somebody's own, at a small rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(steps):
        model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("way", ["distill", "align", "own loop", "copied"])
def test_similarity_says_that_weights_have_changed(way: str, softmax: Any, batches: Any) -> None:
    model = hp.patch_model(copy.deepcopy(softmax), "poly3")
    hp.calibrate(model, batches, progress=False)
    assert said(lambda: hp.similarity(model, batches), "have changed") == []
    assert weights_changed(model) is False
    if way in ("distill", "align"):
        getattr(hp, way)(model, batches, steps=1, progress=False)
    else:
        model = trained(copy.deepcopy(model) if way == "copied" else model, batches)
    assert said(lambda: hp.similarity(model, batches, teacher=softmax), "have changed") == []
    (message,) = said(lambda: hp.similarity(model, batches), "have changed")
    assert "Pass teacher=" in message
    assert said(lambda: hp.similarity(model, batches), "have changed") == []  # once


def test_what_leaves_the_weights_alone_is_no_change(softmax: Any, batches: Any, tmp_path: Path) -> None:
    model = hp.patch_model(softmax, "poly3")
    hp.calibrate(model, batches, progress=False)
    hp.match_layers(model, batches, steps=1, progress=False)
    model.load_state_dict(model.state_dict())
    model.resize_token_embeddings(model.config.vocab_size + 8)
    assert weights_changed(model) is False
    assert weights_changed(model.to(torch.bfloat16)) is False  # other numbers, by a cast
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert weights_changed(loaded) is None  # nobody knows what was before
    hp.distill(loaded.float(), batches, steps=1, progress=False)
    assert weights_changed(loaded) is True
    assert weights_changed(hp.unpatch_model(loaded)) is None


def test_an_uncalibrated_pretrained_model_is_not_saved_in_silence(softmax: Any, batches: Any, tmp_path: Path) -> None:
    def save(model: Any) -> list[str]:
        return said(lambda: model.save_pretrained(tmp_path), "saved uncalibrated")

    model = hp.patch_model(copy.deepcopy(softmax), "poly3")
    assert "\nuncalibrated: 2 of 2 modules." in str(hp.describe(model))
    (message,) = save(model)
    assert "LlamaForCausalLM is saved uncalibrated, in 2 of 2 layers" in message
    assert save(AutoModelForCausalLM.from_pretrained(tmp_path)) == []  # as it was given
    assert save(trained(model, batches)) == []
    assert save(softmax) == []
    hp.calibrate(hp.patch_model(softmax, "poly3"), batches, progress=False)
    assert save(softmax) == []
    assert "uncalibrated" not in str(hp.describe(softmax))


def test_a_model_from_scratch_starts_uncalibrated(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64, vocab_size=99
    )
    model = hp.patch_model(LlamaForCausalLM(config), "poly3")
    assert said(lambda: model.save_pretrained(tmp_path), "uncalibrated") == []
