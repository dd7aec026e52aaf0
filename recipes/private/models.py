"""BERT's encoder and GPT-2 with its head in JAX, of one sequence: the same program in plain text and among parties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.special import erf

from . import owner
from .attention import attention
from .checkpoint import Checkpoint
from .owner import Prepared

Array = Any
Weights = dict[str, Array]
# GELU less x / 2 is even: a polynomial of degree 20 on [−4.5, 4.5], right to 2.3e-5 there, and |x| / 2 beyond.
GELU_END = 4.5
GELU_DEGREE = 10  # in x²
# Of BERT's embeddings before their layer normalization, which does not see it: their variance, of about 0.002, would
# have 9 bits among 18.
EMBEDDINGS = 16.0


def even_part(gelu: Callable[[np.ndarray], np.ndarray]) -> tuple[float, ...]:
    """Returns ascending coefficients of gelu(x) − x / 2 in u = 2 (x / GELU_END)² − 1."""
    x = np.linspace(0.0, GELU_END, 4001)
    series = np.polynomial.Chebyshev.fit(2.0 * (x / GELU_END) ** 2 - 1.0, gelu(x) - x / 2.0, GELU_DEGREE, [-1.0, 1.0])
    return tuple(series.convert(kind=np.polynomial.Polynomial, domain=[-1.0, 1.0]).coef.tolist())


GELU = even_part(lambda x: x * (1.0 + erf(x / np.sqrt(2.0))) / 2.0)
GELU_NEW = even_part(lambda x: x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))) / 2.0)


def activation(x: Array, coefficients: tuple[float, ...]) -> Array:
    """Returns the GELU of `even_part`'s coefficients, with two comparisons an element."""
    above = jnp.maximum(x - GELU_END, 0.0)
    x = jnp.maximum(x - above, -GELU_END)
    u = (x * x) * (2.0 / GELU_END**2) - 1.0
    g = coefficients[-1] * u + coefficients[-2]
    for c in coefficients[-3::-1]:
        g = g * u + c
    return x / 2.0 + g + above


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Returns the layer normalization of the last dimension."""
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * weight + bias


@dataclass(frozen=True, slots=True)
class Model:
    """A program that everybody knows, and the weights that only their owner does.

    Attributes:
        checkpoint: that it is of.
        layers: attention, prepared.
        weights: what is shared in secret, by name.
    """

    checkpoint: Checkpoint
    layers: list[Prepared]
    weights: Weights

    @property
    def vocabulary(self) -> int:
        """Size of it."""
        return int(self.checkpoint.config["vocab_size"])

    def forward(self, weights: Weights, tokens: Array, visible: np.ndarray, seen: list[Any] | None = None) -> Array:
        """Returns hidden states (T, F), or for a language model logits (T, vocabulary).

        Args:
            weights: those of the model, as the parties hold them.
            tokens: one-hot rows, (T, vocabulary): which token it is stays secret.
            visible: public, (T, T), 1 for the keys that a row sees.
            seen: takes query, key and value of each layer.
        """
        return self.after_embedding(weights, self.embed(weights, tokens), visible, seen)

    def embed(self, weights: Weights, tokens: Array) -> Array:
        """Returns the word embeddings (T, F) of one-hot rows: the longest product of all with a large vocabulary."""
        return tokens @ weights[self.word_embeddings]

    @property
    def word_embeddings(self) -> str:
        """Name of their table among the weights."""
        return "wte.weight" if self.checkpoint.causal else "embeddings.word_embeddings.weight"

    def after_embedding(
        self, weights: Weights, hidden: Array, visible: np.ndarray, seen: list[Any] | None = None
    ) -> Array:
        """Returns what `forward` does, from the word embeddings (T, F) on."""
        run = _gpt2 if self.checkpoint.causal else _bert
        return run(self, weights, hidden, visible, [] if seen is None else seen)

    def attend(
        self, number: int, weights: Weights, query: Array, key: Array, value: Array, visible: np.ndarray
    ) -> Array:
        """Returns the output (T, H · D) of a layer's attention; operands (T, H · D)."""
        prefix, heads = f"attention{number}.", self.checkpoint.heads
        secrets = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        parts = (x.reshape(len(x), heads, -1) for x in (query, key, value))
        output = attention(self.layers[number].plan, secrets, *parts, visible)
        return output.reshape(query.shape)


def load(checkpoint: Checkpoint) -> Model:
    """Returns the model with its owner's factors in the weights of queries and values."""
    tensors = dict(checkpoint.tensors)
    bert = not checkpoint.causal
    width = int(checkpoint.config["hidden_size" if bert else "n_embd"])
    layers = owner.prepare(checkpoint, width // checkpoint.heads)
    for number, layer in enumerate(layers):
        query, value = (
            np.repeat(scale, width // checkpoint.heads).astype(np.float32)
            for scale in (layer.query_scale, layer.value_scale)
        )
        if bert:
            for name, scale in (("query", query), ("value", value)):
                place = f"encoder.layer.{number}.attention.self.{name}"
                tensors[f"{place}.weight"] = tensors[f"{place}.weight"] * scale[:, None]
                tensors[f"{place}.bias"] = tensors[f"{place}.bias"] * scale
        else:
            scale = np.concatenate([query, np.ones_like(query), value])
            for name in (f"h.{number}.attn.c_attn.weight", f"h.{number}.attn.c_attn.bias"):
                tensors[name] = tensors[name] * scale
        tensors |= {f"attention{number}.{name}": x for name, x in layer.secrets.items()}
    unused = [name for name in tensors if name.startswith("pooler.")]
    for name in tensors:
        if name.startswith("embeddings.") and name.endswith("_embeddings.weight"):
            tensors[name] = tensors[name] * np.float32(EMBEDDINGS)
    return Model(checkpoint, layers, {name: x for name, x in tensors.items() if name not in unused})


def for_length(model: Model, length: int, fraction_bits: int) -> Model:
    """Returns a model for sequences of one length, of which rows see all: see `owner.for_length`."""
    if model.checkpoint.causal:
        return model
    layers = [owner.for_length(layer, length, fraction_bits) for layer in model.layers]
    weights = {name: x for name, x in model.weights.items() if not name.startswith("attention")}
    for number, layer in enumerate(layers):
        for kind in ("weight", "bias"):
            name = f"encoder.layer.{number}.attention.self.value.{kind}"
            weights[name] = weights[name] * np.float32(length**-layer.plan.alpha)
        weights |= {f"attention{number}.{name}": x for name, x in layer.secrets.items()}
    return replace(model, layers=layers, weights=weights)


def _bert(model: Model, weights: Weights, hidden: Array, visible: np.ndarray, seen: list[Any]) -> Array:
    eps = float(model.checkpoint.config["layer_norm_eps"])

    def linear(x: Array, name: str) -> Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Array, name: str, eps: float = eps) -> Array:
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    hidden = hidden + weights["embeddings.position_embeddings.weight"][: len(visible)]
    hidden = hidden + weights["embeddings.token_type_embeddings.weight"][0]
    hidden = norm(hidden, "embeddings.LayerNorm", EMBEDDINGS**2 * eps)
    for number in range(model.checkpoint.layers):
        place = f"encoder.layer.{number}"
        operands = [linear(hidden, f"{place}.attention.self.{name}") for name in ("query", "key", "value")]
        seen.append(operands)
        attended = model.attend(number, weights, *operands, visible)
        hidden = norm(
            hidden + linear(attended, f"{place}.attention.output.dense"), f"{place}.attention.output.LayerNorm"
        )
        inner = activation(linear(hidden, f"{place}.intermediate.dense"), GELU)
        hidden = norm(hidden + linear(inner, f"{place}.output.dense"), f"{place}.output.LayerNorm")
    return hidden


def _gpt2(model: Model, weights: Weights, hidden: Array, visible: np.ndarray, seen: list[Any]) -> Array:
    eps = float(model.checkpoint.config["layer_norm_epsilon"])

    def linear(x: Array, name: str) -> Array:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def norm(x: Array, name: str) -> Array:
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    hidden = hidden + weights["wpe.weight"][: len(visible)]
    for number in range(model.checkpoint.layers):
        place = f"h.{number}"
        operands = jnp.split(linear(norm(hidden, f"{place}.ln_1"), f"{place}.attn.c_attn"), 3, -1)
        seen.append(operands)
        attended = model.attend(number, weights, *operands, visible)
        hidden = hidden + linear(attended, f"{place}.attn.c_proj")
        inner = activation(linear(norm(hidden, f"{place}.ln_2"), f"{place}.mlp.c_fc"), GELU_NEW)
        hidden = hidden + linear(inner, f"{place}.mlp.c_proj")
    return norm(hidden, "ln_f") @ weights["wte.weight"].T
