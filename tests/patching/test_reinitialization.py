"""A calibrated polynomial stays what it is when Transformers initializes the model that it is in, or one around it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    EncoderDecoderModel,
    PreTrainedModel,
    VisionEncoderDecoderModel,
)
from with_heads import output

import hf_polyattn as hp
from hf_polyattn.patching.core import PolyAttention
from hf_polyattn.patching.patched import patched_layers


class WithHead(PreTrainedModel):
    """What users write around an encoder."""

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder.config)
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)
        self.post_init()


class InEncoderDecoder:
    """An encoder-decoder around a text encoder."""

    def __new__(cls, encoder: Any) -> Any:
        from transformers import BertConfig, BertLMHeadModel

        sizes = {"hidden_size": 384, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
        decoder = BertLMHeadModel(BertConfig(**sizes, is_decoder=True, add_cross_attention=True))
        return EncoderDecoderModel(encoder=encoder, decoder=decoder)


class InVisionEncoderDecoder:
    """A decoder of text behind an encoder of images."""

    def __new__(cls, encoder: Any) -> Any:
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_embd": 32, "n_head": 4, "n_layer": 1, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 1}
        decoder = GPT2LMHeadModel(GPT2Config(**sizes, add_cross_attention=True))
        return VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": tensor.clone()
        for path, layer in patched_layers(model)
        for name, tensor in layer.state_dict().items()
    }


AROUND: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "own class, minilm": ("minilm", WithHead),
    "own class, llama": ("llama", WithHead),
    "own class, vit": ("vit", WithHead),
    "own class twice": ("minilm", lambda model: WithHead(WithHead(model))),
    "encoder-decoder": ("minilm", InEncoderDecoder),
    "vision encoder-decoder": ("vit", InVisionEncoderDecoder),
    "init_weights": ("gpt2-zinc", lambda model: model.init_weights()),
    "initialize_weights": ("llama", lambda model: model.initialize_weights()),
    "post_init": ("gpt2-zinc", lambda model: model.post_init()),
    "a copy": ("minilm", lambda model: WithHead(copy.deepcopy(model)).init_weights()),
    "resized embeddings": ("llama", lambda model: model.resize_token_embeddings(520)),
}


@pytest.mark.parametrize("case", AROUND)
def test_calibrated_polynomials_survive_what_initializes(
    case: str, pretrained: Any, polynomial: Any, batch: Any
) -> None:
    name, put = AROUND[case]
    model, inputs = polynomial(pretrained(name)), batch(name)
    before, expected = tensors(model), output(model, inputs)
    put(model)
    assert tensors(model).keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in tensors(model).items())
    assert torch.equal(output(model, inputs), expected)
    for _, layer in patched_layers(model):  # the control
        layer.reset_parameters()
    assert not torch.allclose(output(model, inputs), expected, rtol=0.01)


def test_a_polynomial_in_memory_that_was_not_filled_is_the_uncalibrated_one(pretrained: Any, tmp_path: Any) -> None:
    hp.patch_model(pretrained("llama", "AutoModelForCausalLM"), "taylor3-l1").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for empty in (torch.device("meta"), init_empty_weights()):
        with empty:
            model = AutoModelForCausalLM.from_config(config)
        _, layer = patched_layers(model)[0]
        assert {tensor.device.type for tensor in layer.parameters()} == {"meta"}
        model.to_empty(device="cpu")
        model.init_weights()
        fresh = PolyAttention(layer.config, layer.heads, layer.head_dim).state_dict()
        for _, layer in patched_layers(model):
            assert all(torch.equal(value, fresh[key]) for key, value in layer.state_dict().items())
