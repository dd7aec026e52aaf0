"""Whole models next to softmax's, in inference and in a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..patching.patch import patch_model
from ..spec import PolyAttentionConfig, Polynomial
from .cases import SPECS, dtype_name
from .timing import alternate


def _bert(layers: int, hidden: int, heads: int) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden
    )
    return BertModel(config, add_pooling_layer=False)


def _vit(hidden: int, heads: int) -> Any:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden)
    return ViTModel(config, add_pooling_layer=False)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config())


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64,
        )
    )  # fmt: skip


# Random weights of real shapes: the speed is that of the checkpoint. Batch and length are the input's.
MODELS: dict[str, dict[str, tuple[Callable[[], Any], int, int]]] = {
    "cpu": {"MiniLM-L6": (partial(_bert, 6, 384, 12), 8, 128), "ViT-tiny": (partial(_vit, 192, 3), 4, 197)},
    "cuda": {
        "BERT-base": (partial(_bert, 12, 768, 12), 32, 512),
        "GPT-2": (_gpt2, 16, 1024),
        "Llama-1B": (_llama, 2, 4096),
        "ViT-B": (partial(_vit, 768, 12), 64, 197),
    },
}


def time_models(device: str, dtype: torch.dtype, repeats: int) -> Iterator[list[dict[str, Any]]]:
    """Yields one row for each spec of a model: milliseconds of inference and of a training step next to SDPA's."""
    for name, (make, batch, length) in MODELS[device].items():
        with torch.device(device):
            original = make().to(dtype).eval()
            original.set_attn_implementation("sdpa")
            inputs = _inputs(original, batch, length, dtype)
        contestants = {"softmax": original}
        for spec in SPECS:
            patched = make().to(device, dtype).eval()
            patched.load_state_dict(original.state_dict())
            config = PolyAttentionConfig(
                Polynomial.parse(spec.spec),
                learnable=spec.calibrated,
                interval=spec.calibrated,
                clamp=spec.calibrated,
                key_shift=spec.calibrated,
            )
            contestants[str(spec)] = patch_model(patched, config)
        times = {
            kind: alternate({key: partial(run, model, inputs) for key, model in contestants.items()}, repeats, device)
            for kind, run in (("infer", _infer), ("train", _train))
        }
        rows = []
        for spec in SPECS:
            row: dict[str, Any] = {"model": name, "batch": batch, "length": length, "dtype": dtype_name(dtype)}
            row["spec"] = str(spec)
            for kind, ms in times.items():
                ours, softmax = ms[str(spec)], ms["softmax"]
                row[kind] = {"ms": ours, "softmax_ms": softmax, "latency": round(ours / softmax, 3)}
            rows.append(row)
        yield rows


def _inputs(model: Any, batch: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 3, 224, 224, dtype=dtype)}
    return {"input_ids": torch.randint(5, 1000, (batch, length))}


@torch.no_grad()
def _infer(model: Any, inputs: dict[str, Tensor]) -> None:
    model(**inputs)


def _train(model: Any, inputs: dict[str, Tensor]) -> None:
    model(**inputs).last_hidden_state.float().square().mean().backward()
    model.zero_grad(set_to_none=True)
