"""Checkpoints in float64, where two ways must agree: the bound is rounding alone, 1e-9 of the largest number.

Llama's norms and rotary embeddings compute in float32 even then, and its scores reach ±280: 1e-4.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_polyattn.patching.core import PolyAttention
from hf_polyattn.patching.patched import patched_layers

BASE = {
    "minilm": "AutoModel",
    "gpt2-tinystories": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
}
all_four = pytest.mark.parametrize("name", list(BASE))
decoders = pytest.mark.parametrize("name", ["gpt2-tinystories", "llama"])


@torch.no_grad()
def output(model: Any, **inputs: Any) -> Tensor:
    return model(**inputs)[0]


def same(name: str, actual: Tensor, expected: Tensor) -> bool:
    """Whether two float64 results differ by rounding alone."""
    bound = (1e-4 if name == "llama" else 1e-9) * expected.abs().max()
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= bound)


def as_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def visible_pairs(name: str, attention_mask: Tensor) -> Tensor:
    """What each query may see, (B, 1, T, T): real keys, and no later ones in a decoder."""
    length = attention_mask.shape[1]
    pairs = attention_mask.bool()[:, None, None, :].expand(-1, 1, length, length)
    return pairs if name == "minilm" else pairs.tril()


class Recorder:
    """Records what the polynomial modules of a model get and return, while in use."""

    def __init__(self, model: Any) -> None:
        self.layers = [layer for _, layer in patched_layers(model)]
        self.calls: list[tuple[tuple[Tensor, ...], dict[str, Any], Any]] = []

    def __enter__(self) -> Recorder:
        self.hooks = [layer.register_forward_hook(self.record, with_kwargs=True) for layer in self.layers]
        return self

    def record(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.calls.append((args, kwargs, out))

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def textbook_weights(layer: PolyAttention, query: Tensor, key: Tensor, scaling: float, visible: Tensor) -> Tensor:
    """The formula of DESIGN.md, one line each, on expanded keys and whole matrices."""
    config = layer.config
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    t = scaling * torch.einsum("bhid,bhjd->bhij", query, key)
    if config.key_shift:
        t = t - scaling * torch.einsum("bhid,hd->bhi", query, layer.key_shift.to(query))[..., None]
    if config.interval:
        t = (t - layer.center[:, None, None]) / layer.radius[:, None, None]
    if config.clamp:
        t = t.clamp(-1, 1)
    powers = torch.stack([t**k for k in range(config.spec.degree + 1)], dim=-1)
    change = torch.einsum("hl,hlk->hk", layer.delta.to(query), layer.directions.to(query))
    coefficients = (layer.coefficients.to(query) + change).expand(query.shape[1], -1)
    w = torch.einsum("bhijk,hk->bhij", powers, coefficients) ** config.spec.power * visible.to(query)
    n = visible.to(w).expand_as(w).sum(-1, keepdim=True).clamp(min=1)
    scale = {"rsqrt": n**-0.5, "mean": 1 / n, "none": 1.0, "l1": 1 / (1e-37 + w.abs().sum(-1, keepdim=True))}
    return w * scale[config.spec.normalizer]
