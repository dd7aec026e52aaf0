"""Whole models next to softmax's, in inference and in a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..patching.patch import patch_model
from ..patching.row_shift import SQUARES
from ..spec import PolyAttentionConfig, Polynomial
from .cases import SPECS, Spec, dtype_name
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


# Random weights of real shapes: the speed is that of the checkpoint. Batches and lengths are the inputs'.
MODELS: dict[str, dict[str, tuple[Callable[[], Any], tuple[tuple[int, int], ...]]]] = {
    "cpu": {
        "MiniLM-L6": (partial(_bert, 6, 384, 12), ((1, 16), (1, 128), (8, 128), (4, 512))),
        "ViT-tiny": (partial(_vit, 192, 3), ((1, 197), (4, 197))),
    },
    "cuda": {
        "BERT-base": (partial(_bert, 12, 768, 12), ((32, 512),)),
        "GPT-2": (_gpt2, ((16, 1024),)),
        "Llama-1B": (_llama, ((2, 4096),)),
        "ViT-B": (partial(_vit, 768, 12), ((64, 197),)),
    },
}


def time_models(device: str, dtype: torch.dtype, repeats: int) -> Iterator[list[dict[str, Any]]]:
    """Yields one row for each spec of a model: milliseconds of inference and of a training step next to SDPA's."""
    for name, (make, shapes) in MODELS[device].items():
        with torch.device(device):
            original = make().to(dtype).eval()
            original.set_attn_implementation("sdpa")
        contestants = {"softmax": original}
        for spec in SPECS:
            patched = make().to(device, dtype).eval()
            patched.load_state_dict(original.state_dict())
            contestants[str(spec)] = patch_model(patched, config_of(spec))
        for batch, length in shapes:
            with torch.device(device):
                inputs = _inputs(original, batch, length, dtype)
            about = {"model": name, "batch": batch, "length": length, "dtype": dtype_name(dtype)}
            yield _time(contestants, inputs, about, repeats, device)


def config_of(spec: Spec) -> PolyAttentionConfig:
    """Returns what `calibrate` makes of a spec on most checkpoints: powers have a linear row shift, others moments."""
    polynomial, calibrated = Polynomial.parse(spec.spec), spec.calibrated
    moments = calibrated and polynomial.power == 1
    return PolyAttentionConfig(
        polynomial,
        learnable=calibrated,
        interval=calibrated,
        clamp=calibrated,
        row_shift="moments" if moments else "linear" if calibrated else "none",
        squares=SQUARES if moments else 0,
    )


def _time(
    contestants: dict[str, Any], inputs: dict[str, Tensor], about: dict[str, Any], repeats: int, device: str
) -> list[dict[str, Any]]:
    times = {
        kind: alternate({key: partial(run, model, inputs) for key, model in contestants.items()}, repeats, device)
        for kind, run in (("infer", _infer), ("train", _train))
    }
    rows = []
    for spec in SPECS:
        row = {**about, "spec": str(spec)}
        for kind, ms in times.items():
            ours, softmax = ms[str(spec)], ms["softmax"]
            row[kind] = {"ms": ours, "softmax_ms": softmax, "latency": round(ours / softmax, 3)}
        rows.append(row)
    return rows


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
