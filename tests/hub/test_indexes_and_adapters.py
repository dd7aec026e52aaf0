"""Damaged indexes of shards and adapters raise one error that names them; cards of adapters name the polynomials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_polyattn.errors import CheckpointError

INDEXES: dict[str, Any] = {
    "no JSON": "{",
    "a list": "[]",
    "no weight_map": '{"metadata": {}}',
    "weight_map a list": '{"metadata": {}, "weight_map": ["model-00001-of-00002.safetensors"]}',
    "empty weight_map": '{"metadata": {}, "weight_map": {}}',
    "names that are numbers": '{"metadata": {}, "weight_map": {"a": 1}}',
    "no metadata": '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
    "too deep": "[" * 100_000,
}


@pytest.fixture(scope="module")
def sharded(pretrained: Any, polynomial: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    polynomial(pretrained("minilm", num_hidden_layers=1)).save_pretrained(folder, max_shard_size="20MB")
    return folder


@pytest.mark.parametrize("damage", INDEXES)
def test_a_malformed_index_of_shards_is_named(damage: str, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    whole = index.read_text()
    assert len(set(json.loads(whole)["weight_map"].values())) > 1
    index.write_text(INDEXES[damage])
    try:
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json .*index of shards.*Download"):
            AutoModel.from_pretrained(sharded)
    finally:
        index.write_text(whole)
    AutoModel.from_pretrained(sharded)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["coefficients", "delta", "radius"])
def test_an_adapter_with_broken_polynomials_is_refused(
    value: float, name: str, pretrained: Any, polynomial: Any, tmp_path: Path
) -> None:
    def base() -> Any:
        return polynomial(pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=1))

    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["polyattn"], task_type="CAUSAL_LM")
    peft.get_peft_model(base(), config).save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(base(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(f"polyattn.{name}"))
    tensors[key].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"the adapter: tensor '.*polyattn\.{name}' has NaN or infinite values"):
        peft.PeftModel.from_pretrained(base(), tmp_path)
    with pytest.raises(CheckpointError, match="the adapter"):
        base().load_adapter(str(tmp_path))


def test_the_card_of_an_adapter_names_the_polynomials(pretrained: Any, polynomial: Any, tmp_path: Path) -> None:
    model = polynomial(pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=1))
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["polyattn"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    for _ in range(2):  # written again over itself
        adapted.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"hf_polyattn", "polynomial-attention", "poly3", "lora"} <= set(card.data.tags)
    assert card.data.library_name == "peft"
    assert card.text.count("## Polynomial attention") == 1
    assert "`poly3`" in card.text
    assert "import hf_polyattn" in card.text
    softmax = pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=1)
    peft.get_peft_model(softmax, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "softmax")
    assert "polyattn" not in (tmp_path / "softmax" / "README.md").read_text()
