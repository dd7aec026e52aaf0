"""The oldest supported Transformers and the installed one both run the whole way."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

OLDEST = "5.17.0"
OVERLAY = Path(__file__).resolve().parents[1] / ".cache" / f"transformers-{OLDEST}"

SMOKE = """
import sys, tempfile
import torch, transformers
import hf_polyattn as hp
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

torch.set_num_threads(1)
torch.manual_seed(0)
ids = torch.tensor([[1, 403, 407, 261, 378, 30, 31], [1, 9, 40, 41, 50, 0, 0]])
padded = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}
# Two rows: a product with one row depends, in its last bit, on where in memory the weights lie.
inputs = {"image": {"pixel_values": torch.randn(2, 3, 224, 224)}, "text": padded}
config = hp.PolyAttentionConfig("poly3", interval=True, clamp=True, key_shift=True)

for path, auto_class, kind in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    auto_class = getattr(transformers, auto_class)
    model = auto_class.from_pretrained(path).eval()
    run = torch.no_grad()(lambda model, **kwargs: model(**inputs[kind], **kwargs))
    before, softmax = model.config.to_json_string(), run(model)[0]

    hp.patch_model(model, config)
    for layer in (module for module in model.modules() if type(module).__name__ == "PolyAttention"):
        with torch.no_grad():
            layer.coefficients.add_(0.2 * torch.randn(layer.coefficients.shape))
            layer.radius.fill_(6.0)
            layer.key_shift.normal_(std=0.1)
    polynomial = run(model)[0]
    assert (polynomial - softmax).abs().max() > 0.05 * softmax.abs().max()
    weights = run(model, output_attentions=True).attentions
    assert len(weights) == model.config.num_hidden_layers and weights[0].dim() == 4
    if kind == "text":  # a mask hides: what is padded has no influence
        other = {**padded, "input_ids": ids.masked_fill(padded["attention_mask"] == 0, 5)}
        with torch.no_grad():
            changed = model(**other)[0]
        assert torch.equal(changed[1, :5], polynomial[1, :5])
        visible = {**other, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            assert auto_class is AutoModelForCausalLM or not torch.equal(model(**visible)[0][1, :5], polynomial[1, :5])
    if model.can_generate():
        double = model.double()
        greedy = [
            double.generate(ids[:1], max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0)
            for cache in (True, False)
        ]
        assert torch.equal(*greedy) and greedy[0].shape[1] > ids.shape[1]
        model = model.float()

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = auto_class.from_pretrained(folder).eval()
        assert torch.equal(run(again)[0], run(model)[0])
        low = auto_class.from_pretrained(folder, dtype=torch.bfloat16)
        kept = [value for key, value in low.state_dict().items() if "polyattn" in key]
        assert {value.dtype for value in kept} == {torch.float32, torch.uint8}
        if model.can_generate():
            tensors = load_file(f"{folder}/model.safetensors")
            radius = next(key for key in tensors if key.endswith("polyattn.radius"))
            for wrong, message in (({**tensors, radius: -tensors[radius]}, "positive"), ({}, "missing")):
                kept = wrong or {key: value for key, value in tensors.items() if key != radius}
                save_file(kept, f"{folder}/model.safetensors", metadata={"format": "pt"})
                try:
                    auto_class.from_pretrained(folder)
                except hp.CheckpointError as error:
                    assert message in str(error) and radius.rpartition(".")[0] in str(error), error
                else:
                    raise AssertionError(f"loaded with a radius that is not {message}")
    with hp.softmax_attention(again):
        assert torch.equal(run(again)[0], softmax)
    hp.unpatch_model(model)
    assert torch.equal(run(model)[0], softmax)
    assert model.config.to_json_string() == before
print(transformers.__version__)
"""


def smoke(checkpoint: Any, overlay: Path | None) -> str:
    cases = [
        (checkpoint("minilm"), "AutoModel", "text"),
        (checkpoint("gpt2-tinystories"), "AutoModelForCausalLM", "text"),
        (checkpoint("llama"), "AutoModelForCausalLM", "text"),
        (checkpoint("vit"), "AutoModelForImageClassification", "image"),
    ]
    environment = dict(os.environ)
    if overlay is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(overlay), environment.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        )
    command = [sys.executable, "-c", SMOKE, *(str(part) for case in cases for part in case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_the_installed_transformers(checkpoint: Any) -> None:
    assert smoke(checkpoint, None) == version("transformers")


def test_the_oldest_transformers(checkpoint: Any) -> None:
    if not (OVERLAY / "transformers").is_dir():
        pytest.skip(f"needs .cache/{OVERLAY.name}: make setup")
    assert smoke(checkpoint, OVERLAY) == OLDEST
