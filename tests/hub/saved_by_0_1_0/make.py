"""Wrote the checkpoints beside it, with hf_polyattn 0.1.0: `python tests/hub/saved_by_0_1_0/make.py` at commit e90ff54.

Kept to say what they are; a later version must load them, not write them again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import hf_polyattn as hp

FOLDER = Path(__file__).parent
IDS = torch.arange(3, 35).view(4, 8) % 61
IMAGES = torch.linspace(-1.0, 1.0, 4 * 3 * 16 * 16).sin().mul(7.0).sin().view(4, 3, 16, 16)
SHARP = {"initializer_range": 0.4}  # scores far from 0, where every polynomial is another


def save(name: str, model: torch.nn.Module, spec: str, inputs: dict[str, torch.Tensor]) -> None:
    model.eval()
    hp.patch_model(model, spec)
    hp.calibrate(model, [inputs], progress=False)
    model.save_pretrained(FOLDER / name)
    with torch.no_grad():
        output = model.double()(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})[0]
    save_file({**inputs, "output": output}, FOLDER / name / "answers.safetensors")


def main() -> None:
    torch.manual_seed(0)
    text = {"input_ids": IDS}
    width = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 32}
    save("bert", BertModel(BertConfig(**width, vocab_size=61, max_position_embeddings=16, **SHARP)), "poly6-l1", text)
    gpt2 = GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=61, n_positions=16, bos_token_id=1, eos_token_id=1)
    gpt2.initializer_range = 0.4
    save("gpt2", GPT2LMHeadModel(gpt2), "poly3", text)
    llama = LlamaConfig(**width, num_key_value_heads=1, vocab_size=61, max_position_embeddings=16, **SHARP)
    save("llama", LlamaForCausalLM(llama), "poly3^16-l1", text)
    vit = ViTConfig(**width, image_size=16, patch_size=4, num_labels=5, **SHARP)
    save("vit", ViTForImageClassification(vit), "poly4-mean", {"pixel_values": IMAGES})


if __name__ == "__main__":
    main()
