"""Models made of two, of which one half is polynomial: it stays so, and the other half stays softmax to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    EncoderDecoderModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    VisionEncoderDecoderModel,
    ViTModel,
)

import hf_polyattn as hp
from hf_polyattn.patching.patched import patched_layers
from hf_polyattn.patching.saved_config import SAVED_IMPLEMENTATION

HALVES = ("encoder", "decoder")
CONFIG = hp.PolyAttentionConfig("poly3", interval=True, clamp=True, key_shift=True)


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)[0]


def guard(config: dict[str, Any]) -> tuple[str | None, bool]:
    return config.get("attn_implementation"), "polyattn_config" in config


def saved_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def joined(encoder: Any, decoder: Path) -> Any:
    """Returns an image encoder with a text decoder, whose cross-attention is new."""
    text = AutoModelForCausalLM.from_pretrained(decoder, add_cross_attention=True)
    return VisionEncoderDecoderModel(encoder=encoder, decoder=text).eval()


@pytest.fixture
def captioner(checkpoint: Callable[[str], Path], batch: Any) -> Callable[[], tuple[Any, dict[str, Tensor]]]:
    """`captioner()`: ViT-tiny, gpt2-tinystories with cross-attention added, as large as to matter, and inputs."""

    def make() -> tuple[Any, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = joined(ViTModel.from_pretrained(checkpoint("vit")), checkpoint("gpt2-tinystories"))
        for name, parameter in model.named_parameters():
            if "crossattention.c_attn" in name or "crossattention.q_attn" in name or "enc_to_dec_proj" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        text = batch("gpt2-tinystories")
        inputs = {"decoder_input_ids": text["input_ids"], "decoder_attention_mask": text["attention_mask"]}
        return model, {**batch("vit"), **inputs}

    return make


RELOAD = """
import sys, torch
import hf_polyattn, transformers
torch.set_num_threads({threads})
case = torch.load(sys.argv[1] + ".pt")
model = getattr(transformers, case["class"]).from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    print(torch.equal(model(**case["inputs"])[0], case["output"]))
"""


def loads_elsewhere(model: Any, inputs: dict[str, Tensor], folder: Path) -> bool:
    """Whether a new process that loads the saved model computes the same to the bit."""
    torch.save({"class": type(model).__name__, "inputs": inputs, "output": output(model, inputs)}, f"{folder}.pt")
    code = RELOAD.format(threads=torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split() == ["True"]


REFUSED = """
import sys, transformers
try:
    transformers.VisionEncoderDecoderModel.from_pretrained(sys.argv[1])
except ValueError as error:
    print("polyattn" in str(error))
"""


def is_refused_without_the_plugin(folder: Path) -> bool:
    """Whether a Transformers that has not imported this package refuses to load a model."""
    done = subprocess.run([sys.executable, "-c", REFUSED, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split() == ["True"]


# ---------------------------------------------------------------- an image encoder and a text decoder


@pytest.mark.parametrize("way", ["exclude", "submodel"])
@pytest.mark.parametrize("half", HALVES)
def test_one_half_of_an_encoder_decoder_is_polynomial(
    half: str, way: str, captioner: Any, polynomial: Any, tmp_path: Path
) -> None:
    model, inputs = captioner()
    other = HALVES[half == "encoder"]
    parts = {"encoder": {"pixel_values": inputs["pixel_values"]}, "decoder": {"input_ids": inputs["decoder_input_ids"]}}
    softmax = {name: output(getattr(model, name), parts[name]) for name in HALVES}
    whole = output(model, inputs)
    if way == "submodel":
        polynomial(getattr(model, half), CONFIG)
    else:
        config = hp.PolyAttentionConfig.from_dict({**CONFIG.to_dict(), "exclude": [f"{other}.*"]})
        polynomial(model, config)
    layers = {"encoder": 12, "decoder": 4}[half]
    assert len(patched_layers(model)) == layers
    ours = output(model, inputs)
    assert not torch.equal(ours, whole)

    model.save_pretrained(tmp_path / "first")
    again = VisionEncoderDecoderModel.from_pretrained(tmp_path / "first").eval()
    again.save_pretrained(tmp_path / "model")
    for folder in (tmp_path / "first", tmp_path / "model"):
        config = saved_config(folder)
        assert guard(config[half]) == (SAVED_IMPLEMENTATION, True)
        assert guard(config[other]) == (None, False)
        assert guard(config) == (SAVED_IMPLEMENTATION, True)
    reloaded = VisionEncoderDecoderModel.from_pretrained(tmp_path / "model").eval()
    assert {path.split(".")[0] for path, _ in patched_layers(reloaded)} == {half}
    assert len(patched_layers(reloaded)) == layers
    assert torch.equal(output(reloaded, inputs), ours)
    assert torch.equal(output(getattr(reloaded, other), parts[other]), softmax[other])
    assert not torch.equal(output(getattr(reloaded, half), parts[half]), softmax[half])
    assert loads_elsewhere(model, inputs, tmp_path / "model")
    assert is_refused_without_the_plugin(tmp_path / "model")
    assert torch.equal(output(hp.unpatch_model(reloaded), inputs), whole)


def test_a_whole_whose_halves_are_unpatched_is_saved_as_what_it_is(
    captioner: Any, polynomial: Any, tmp_path: Path
) -> None:
    model, inputs = captioner()
    whole = output(model, inputs)
    polynomial(model, CONFIG)
    hp.unpatch_model(model.encoder)
    ours = output(model, inputs)
    model.save_pretrained(tmp_path / "half")
    reloaded = VisionEncoderDecoderModel.from_pretrained(tmp_path / "half").eval()
    assert {path.split(".")[0] for path, _ in patched_layers(reloaded)} == {"decoder"}
    assert torch.equal(output(reloaded, inputs), ours)
    assert not torch.equal(ours, whole)
    hp.unpatch_model(model.decoder).save_pretrained(tmp_path / "decoder")
    model.save_pretrained(tmp_path / "none")
    assert guard(saved_config(tmp_path / "none")) == (None, False)
    assert torch.equal(output(VisionEncoderDecoderModel.from_pretrained(tmp_path / "none").eval(), inputs), whole)


def test_a_half_saved_alone_loads_as_what_it_is(captioner: Any, polynomial: Any, tmp_path: Path) -> None:
    model, inputs = captioner()
    polynomial(model, hp.PolyAttentionConfig("poly3", exclude=["decoder.*"]))
    model.encoder.save_pretrained(tmp_path / "encoder")
    model.decoder.save_pretrained(tmp_path / "decoder")
    assert guard(saved_config(tmp_path / "encoder")) == (SAVED_IMPLEMENTATION, True)
    assert guard(saved_config(tmp_path / "decoder")) == (None, False)
    pixels, text = {"pixel_values": inputs["pixel_values"]}, {"input_ids": inputs["decoder_input_ids"]}
    encoder = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").eval()
    assert len(patched_layers(encoder)) == 12
    assert not hp.is_patched(decoder)
    assert torch.equal(output(encoder, pixels), output(model.encoder, pixels))
    assert torch.equal(output(decoder, text), output(model.decoder, text))
    with hp.softmax_attention(model):
        assert not torch.equal(output(encoder, pixels), output(model.encoder, pixels))


def test_a_patched_half_joins_a_softmax_half(captioner: Any, checkpoint: Any, polynomial: Any, tmp_path: Path) -> None:
    encoder = polynomial(ViTModel.from_pretrained(checkpoint("vit")), CONFIG).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    model = joined(ViTModel.from_pretrained(tmp_path / "encoder"), checkpoint("gpt2-tinystories"))
    _, inputs = captioner()
    pixels = {"pixel_values": inputs["pixel_values"]}
    assert {path.split(".")[0] for path, _ in patched_layers(model)} == {"encoder"}
    assert torch.equal(output(model.encoder, pixels), output(encoder, pixels))
    model.save_pretrained(tmp_path / "model")
    reloaded = VisionEncoderDecoderModel.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(output(reloaded, inputs), output(model, inputs))
    assert torch.equal(output(reloaded.encoder, pixels), output(encoder, pixels))
    with hp.softmax_attention(encoder):
        assert not torch.equal(output(reloaded.encoder, pixels), output(encoder, pixels))


def test_cross_attention_between_two_checkpoints_is_calibrated_and_kept(captioner: Any, tmp_path: Path) -> None:
    model, inputs = captioner()
    whole = output(model, inputs)
    hp.patch_model(model, "poly6-l1", exclude=["encoder.*"], cross_attention=True)
    assert len(patched_layers(model)) == 8
    bare = (output(model, inputs) - whole).square().mean()
    report = hp.calibrate(model, [inputs], progress=False)
    assert report.rows == int(inputs["decoder_attention_mask"].sum())
    assert (output(model, inputs) - whole).square().mean() < 0.1 * bare
    model.save_pretrained(tmp_path)
    reloaded = VisionEncoderDecoderModel.from_pretrained(tmp_path).eval()
    assert len(patched_layers(reloaded)) == 8
    assert torch.equal(output(reloaded, inputs), output(model, inputs))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "decoder_start_token_id": 1}
    tokens = reloaded.generate(inputs["pixel_values"], **settings)
    assert torch.equal(reloaded.generate(inputs["pixel_values"], **settings, use_cache=False), tokens)


def test_two_text_checkpoints_with_a_polynomial_encoder(
    checkpoint: Any, batch: Any, polynomial: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(checkpoint("minilm"), checkpoint("gpt2-zinc")).eval()
    text = batch("minilm")
    inputs = {**text, "decoder_input_ids": batch("gpt2-zinc")["input_ids"]}
    whole = output(model, inputs)
    polynomial(model, hp.PolyAttentionConfig("poly3", include=["encoder.*"]))
    assert len(patched_layers(model)) == 6
    assert not torch.equal(output(model, inputs), whole)
    model.save_pretrained(tmp_path)
    reloaded = EncoderDecoderModel.from_pretrained(tmp_path).eval()
    assert torch.equal(output(reloaded, inputs), output(model, inputs))
    assert torch.equal(output(hp.unpatch_model(reloaded), inputs), whole)


# ---------------------------------------------------------------- images and text side by side

TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64,
    "eos_token_id": 2, "initializer_range": 0.4,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "initializer_range": 0.4,
}  # fmt: skip


def clip() -> Any:
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, initializer_factor=20.0)).eval()


@pytest.mark.parametrize("half", ["text", "vision"])
def test_one_half_of_a_dual_encoder_is_polynomial(half: str, polynomial: Any, tmp_path: Path) -> None:
    model, other = clip(), {"text": "vision", "vision": "text"}[half]
    inputs = {
        "text": {"input_ids": torch.tensor([[3, 4, 5, 6, 2]])},
        "vision": {"pixel_values": torch.randn(1, 3, 32, 32)},
    }
    softmax = {name: output(getattr(model, f"{name}_model"), inputs[name]) for name in inputs}
    polynomial(model, hp.PolyAttentionConfig("poly3", include=[f"{half}_model.*"]))
    ours = output(getattr(model, f"{half}_model"), inputs[half])
    assert not torch.equal(ours, softmax[half])

    model.save_pretrained(tmp_path / "first")
    CLIPModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "model")
    config = saved_config(tmp_path / "model")
    assert guard(config) == guard(config[f"{half}_config"]) == (SAVED_IMPLEMENTATION, True)
    assert guard(config[f"{other}_config"]) == (None, False)
    reloaded = CLIPModel.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(output(getattr(reloaded, f"{half}_model"), inputs[half]), ours)
    assert torch.equal(output(getattr(reloaded, f"{other}_model"), inputs[other]), softmax[other])
    classes = {"text": CLIPTextModel, "vision": CLIPVisionModel}
    assert torch.equal(output(classes[half].from_pretrained(tmp_path / "model").eval(), inputs[half]), ours)
    alone = classes[other].from_pretrained(tmp_path / "model").eval()
    assert not hp.is_patched(alone)
    assert torch.equal(output(alone, inputs[other]), softmax[other])


def llava() -> Any:
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={**VISION, "model_type": "clip_vision_model", "initializer_factor": 20.0},
        text_config={**TEXT, "model_type": "llama", "num_key_value_heads": 2},
        image_token_index=60,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("half", ["language_model", "vision_tower"])
def test_one_half_of_a_vision_language_model_is_polynomial(half: str, polynomial: Any, tmp_path: Path) -> None:
    model = llava()
    tokens = torch.tensor([[1, 5, *[60] * 16, 7, 9]])
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 32, 32)}
    parts = {
        "language_model": {"input_ids": torch.tensor([[1, 5, 7, 9]])},
        "vision_tower": {"pixel_values": inputs["pixel_values"]},
    }
    softmax = {name: output(getattr(model.model, name), parts[name]) for name in parts}
    whole = output(model, inputs)
    polynomial(model, hp.PolyAttentionConfig("poly3", include=[f"*{half}*"]))
    ours = output(model, inputs)
    assert not torch.equal(ours, whole)

    model.save_pretrained(tmp_path / "first")
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "model")
    nested = {"language_model": "text_config", "vision_tower": "vision_config"}
    config = saved_config(tmp_path / "model")
    assert {name: guard(config[key])[1] for name, key in nested.items()} == {name: name == half for name in nested}
    reloaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    assert len(patched_layers(reloaded)) == 2
    assert torch.equal(output(reloaded, inputs), ours)
    for name, part in parts.items():
        assert torch.equal(output(getattr(reloaded.model, name), part), softmax[name]) == (name != half)
    assert torch.equal(output(hp.unpatch_model(reloaded), inputs), whole)
