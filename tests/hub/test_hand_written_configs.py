"""A config that somebody wrote beside a softmax checkpoint: the parameters that the checkpoint lacks are the spec's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from auto_classes import SAVED
from torch import Tensor
from transformers import AutoConfig

import hf_polyattn as hp
from hf_polyattn.patching.core import PolyAttention
from hf_polyattn.patching.patched import patched_layers


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)[0]


@pytest.fixture
def hand_written(pretrained: Any, checkpoint: Any) -> Any:
    """`hand_written(name, config)`: a softmax checkpoint loaded with a polyattn config that someone wrote."""

    def load(name: str, polyattn_config: hp.PolyAttentionConfig) -> Any:
        config = AutoConfig.from_pretrained(checkpoint(name))
        config.polyattn_config = polyattn_config.to_dict()
        return pretrained(name, SAVED.get(name, "AutoModel"), config=config)

    return load


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what a checkpoint does not have with garbage, as uninitialised memory may be."""
    empty_like = torch.empty_like

    def garbage(*args: Any, **kwargs: Any) -> Tensor:
        tensor = empty_like(*args, **kwargs)
        return tensor.fill_(-123.0) if tensor.is_floating_point() and not tensor.is_meta else tensor

    monkeypatch.setattr(torch, "empty_like", garbage)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("spec", ["poly3", "taylor2-l1", "poly3^16-l1"])
@pytest.mark.parametrize("name", SAVED)
def test_a_softmax_checkpoint_gets_the_coefficients_of_the_spec(name: str, spec: str, hand_written: Any) -> None:
    model = hand_written(name, hp.PolyAttentionConfig(spec))
    layers = patched_layers(model)
    assert len(layers) == len(hp.describe(model).rows) > 0
    expected = torch.tensor(hp.Polynomial.parse(spec).initial_coefficients())
    for _, layer in layers:
        assert torch.equal(layer.coefficients, expected.expand(layer.heads, -1))
        assert torch.equal(layer.center, torch.zeros(layer.heads))
        assert torch.equal(layer.key_shift, torch.zeros(layer.heads, layer.head_dim))
        assert torch.equal(layer.radius, torch.ones(layer.heads))


@pytest.mark.usefixtures("poisoned")
def test_the_poison_of_this_file_reaches_missing_parameters(hand_written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PolyAttention, "reset_parameters", lambda self: None)
    _, layer = patched_layers(hand_written("gpt2-zinc", hp.PolyAttentionConfig("poly3")))[0]
    assert (layer.coefficients == -123.0).all()


def test_a_hand_written_config_is_patched_like_patch_model(pretrained: Any, hand_written: Any, batch: Any) -> None:
    inputs = batch("gpt2-zinc")
    expected = hp.patch_model(pretrained("gpt2-zinc"), "taylor2-l1", layers=[1, 2])
    model = hand_written("gpt2-zinc", hp.PolyAttentionConfig("taylor2-l1", layers=[1, 2]))
    assert [path for path, _ in patched_layers(model)] == ["h.1.attn", "h.2.attn"]
    assert torch.equal(output(model, inputs), output(expected, inputs))
    with hp.softmax_attention(model):
        assert not torch.equal(output(model, inputs), output(expected, inputs))
    assert torch.equal(output(hp.unpatch_model(model), inputs), output(pretrained("gpt2-zinc"), inputs))
