"""One token of a language model after many: what `generate` does in each of its steps, next to softmax's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..patching.patch import patch_model
from .cases import SPECS, dtype_name
from .models import config_of
from .timing import alternate


def _gpt2(layers: int, hidden: int, heads: int, length: int) -> Any:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, n_positions=length, vocab_size=2048))


def _llama(layers: int, hidden: int, heads: int, groups: int, length: int) -> Any:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=groups, max_position_embeddings=length, vocab_size=512,
        )
    )  # fmt: skip


# Random weights and caches of the shapes of real checkpoints, and the tokens that are cached.
MODELS: dict[str, dict[str, tuple[Callable[[int], Any], tuple[int, ...]]]] = {
    "cpu": {
        "GPT-2, 3 M": (partial(_gpt2, 4, 256, 4), (32, 2048, 16384)),
        "Llama, 260 K": (partial(_llama, 5, 64, 8, 4), (32, 2048, 16384)),
    },
    "cuda": {
        "GPT-2": (partial(_gpt2, 12, 768, 12), (32, 2048, 16384)),
        "Llama-1B": (partial(_llama, 16, 2048, 32, 8), (32, 2048, 16384)),
    },
}


def time_decoding(device: str, dtype: torch.dtype, repeats: int) -> Iterator[list[dict[str, Any]]]:
    """Yields one row for each spec of a model and a number of cached tokens: milliseconds of a token next to SDPA's."""
    for name, (make, lengths) in MODELS[device].items():
        for length in lengths:
            with torch.device(device):
                original = make(length + 1).to(dtype).eval()
            original.set_attn_implementation("sdpa")
            steps = {"softmax": _step(original, length)}
            for spec in SPECS:
                patched = make(length + 1).to(device, dtype).eval()
                patched.load_state_dict(original.state_dict())
                steps[str(spec)] = _step(patch_model(patched, config_of(spec)), length)
            times = alternate(steps, repeats, device)
            about = {"model": name, "cached": length, "dtype": dtype_name(dtype)}
            yield [
                {
                    **about,
                    "spec": spec,
                    "ms": ms,
                    "softmax_ms": times["softmax"],
                    "latency": round(ms / times["softmax"], 3),
                }
                for spec, ms in times.items()
                if spec != "softmax"
            ]


def _step(model: Any, cached: int) -> Callable[[], None]:
    """Returns what computes one token after so many, over and over: the cache is cut to its length again."""
    from transformers import DynamicCache

    config = model.config
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shape = (1, groups, cached, config.hidden_size // config.num_attention_heads)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(keys, values, layer)
    token = torch.full((1, 1), 7, device=model.device)
    # the second is what it was called until Transformers 5.24
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    @torch.no_grad()
    def run() -> None:
        model(input_ids=token, use_cache=True, **{name: cache})
        cache.crop(-1)

    return run
