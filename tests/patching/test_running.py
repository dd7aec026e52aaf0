"""What a patched model runs is its polynomials: nothing else in silence, and no result of softmax under their name."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CLIPConfig, CLIPModel

import hf_polyattn as hp
from hf_polyattn.errors import PatchError


@pytest.fixture
def batches(batch: Any) -> list[dict[str, Tensor]]:
    return [batch("llama"), batch("llama")]


@pytest.fixture
def model(pretrained: Any, batches: Any) -> Any:
    model = hp.patch_model(pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=2), "poly3")
    hp.calibrate(model, batches, progress=False)
    return model


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("asked", ["sdpa", "eager", {"": "sdpa"}])
def test_the_config_of_a_patched_model_refuses_another_attention(asked: Any, model: Any, batches: Any) -> None:
    expected = logits(model, batches[0])
    copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in (model, copied, unpickled):
        with pytest.raises(PatchError, match=r"unpatch_model\(model\).*softmax_attention\(model\)"):
            one.config._attn_implementation = asked
        assert torch.equal(logits(one, batches[0]), expected)
        one.config._attn_implementation = "polyattn"
    with hp.softmax_attention(model):
        model.config._attn_implementation = "eager"  # softmax was asked for
        assert not torch.equal(logits(model, batches[0]), expected)
    assert torch.equal(logits(model, batches[0]), expected)
    hp.unpatch_model(model).config._attn_implementation = "eager"
    assert model.config._attn_implementation == "eager"


def test_a_config_with_polynomials_in_one_part_refuses_as_a_whole() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=16))
    hp.patch_model(model, "poly3", include="text_model*")
    for asked in ("eager", {"vision_config": "eager", "text_config": "eager"}):
        with pytest.raises(PatchError, match=r"CLIP.*'eager' was asked for"):
            model.config._attn_implementation = asked
        assert model.config.vision_config._attn_implementation != "eager"
    with pytest.raises(PatchError, match="CLIPTextConfig"):
        model.config.text_config._attn_implementation = "eager"
    model.config._attn_implementation = {"vision_config": "eager"}
    assert model.config.vision_config._attn_implementation == "eager"
    assert model.config.text_config._attn_implementation == "polyattn"


WAYS = {
    "similarity": lambda model, batches: hp.similarity(model, batches),
    "calibrate": lambda model, batches: hp.calibrate(model, batches, progress=False),
    "diagnose": lambda model, batches: hp.diagnose(model, batches, progress=False),
    "match_layers": lambda model, batches: hp.match_layers(model, batches, steps=1, progress=False),
    "distill": lambda model, batches: hp.distill(model, batches, steps=1, progress=False),
    "align": lambda model, batches: hp.align(model, batches, steps=1, progress=False),
    "anneal": lambda model, batches: hp.anneal(model, batches, ["poly3"], steps=1, progress=False),
    "convert": lambda model, batches: hp.convert(model, batches, floor=0.0, progress=False),
    "Monitor": lambda model, batches: hp.Monitor(model, norms=True),
    "map": lambda model, batches: hp.plot.maps(model, batches[0], 0, 0),
}


@pytest.mark.parametrize("way", WAYS)
def test_softmax_gets_no_results_of_polynomials(way: str, model: Any, batches: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with hp.softmax_attention(model), pytest.raises(PatchError, match=r"inside of softmax_attention\(model\)"):
        WAYS[way](model, batches)
    model.config._attn_implementation_internal = "sdpa"  # behind the attribute, as no setter can see
    with pytest.raises(PatchError, match=r"2 of 2 modules run 'sdpa'.*set_attn_implementation\('polyattn'\)"):
        WAYS[way](model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.set_attn_implementation("polyattn")
    WAYS[way](model, batches)


def test_a_model_that_runs_softmax_is_not_saved_as_polynomial(model: Any, batches: Any, tmp_path: Path) -> None:
    expected = logits(model, batches[0])
    model.config._attn_implementation_internal = "eager"
    with pytest.raises(PatchError, match="run 'eager'"):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()
    model.set_attn_implementation("polyattn")
    with hp.softmax_attention(model):  # which says itself that it is for a while
        model.save_pretrained(tmp_path / "block")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "block"), batches[0]), expected)
