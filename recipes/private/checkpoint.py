"""A saved model, softmax or polynomial, read from its config.json and model.safetensors; without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from hf_polyattn.errors import InputError
from hf_polyattn.spec import Polynomial

CLASSES = {"BertModel": ("", "encoder.layer.{}.attention.self"), "GPT2LMHeadModel": ("transformer.", "h.{}.attn")}
# What the forward pass in `models` computes; a config that asks for anything else is refused.
EXPECTED = {
    "BertModel": {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False},
    "GPT2LMHeadModel": {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
}
# Tensors of a polynomial; one that is not here would be left out in silence.
POLYNOMIAL = ("coefficients", "delta", "directions")
KNOWN = {*POLYNOMIAL, "center", "key_shift", "radius", "settings"}
KNOWN |= {f"moments.{name}" for name in ("weights", "length_shift", "squares", "means", "scales", "lengths")}
KNOWN |= {f"refinements.{i}.{name}" for i in range(2) for name in (*POLYNOMIAL, "steps", "center", "radius")}


@dataclass(frozen=True, slots=True)
class PolynomialLayer:
    """The polynomial of one attention module: its spec, the switches of its config, and its tensors by name."""

    spec: Polynomial
    interval: bool
    clamp: bool
    moments: bool
    shifted: bool
    tensors: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A saved model.

    Attributes:
        architecture: a name in `CLASSES`.
        config: config.json.
        tensors: float32, by the names of the bare model.
        polynomials: of each layer; None for one that is softmax.
    """

    architecture: str
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    polynomials: tuple[PolynomialLayer | None, ...]

    @property
    def layers(self) -> int:
        """Attention layers."""
        return int(self.config["num_hidden_layers" if self.architecture == "BertModel" else "n_layer"])

    @property
    def heads(self) -> int:
        """Heads of each."""
        return int(self.config["num_attention_heads" if self.architecture == "BertModel" else "n_head"])

    @property
    def causal(self) -> bool:
        """Whether a token sees those before it only."""
        return self.architecture == "GPT2LMHeadModel"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Returns the model that `save_pretrained` wrote.

    Raises:
        InputError: no such files, a class or setting that the forward pass does not have, a softmax layer in a model
            that is said to be polynomial, or a tensor of a polynomial that this recipe does not know.
    """
    config_file, weights = folder / "config.json", folder / "model.safetensors"
    if not (config_file.is_file() and weights.is_file()):
        raise InputError(
            f"{folder} needs config.json and model.safetensors (not in shards); save the model there first"
        )
    config = json.loads(config_file.read_text())
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in CLASSES:
        raise InputError(f"{folder} is a {architecture}; private inference has {', '.join(CLASSES)}")
    for name, value in EXPECTED[architecture].items():
        if config.get(name, value) != value:
            raise InputError(f"{folder} has {name}={config[name]!r}; private inference has {value!r} only")
    prefix, pattern = CLASSES[architecture]
    tensors = {name.removeprefix(prefix): np.asarray(tensor) for name, tensor in load_file(weights).items()}
    saved = config.get("polyattn_config")
    count = int(config["num_hidden_layers" if architecture == "BertModel" else "n_layer"])
    places = [pattern.format(i) for i in range(count)]
    polynomials = tuple(_polynomial(place, saved, tensors) for place in places)
    left = [place for place, found in zip(places, polynomials, strict=True) if found is None]
    if saved is not None and left:
        raise InputError(
            f"{folder} is said to be polynomial, but {left[0]} is softmax ({len(left)} of {count} layers): patch every "
            "layer, or give the softmax checkpoint itself"
        )
    own = {name: tensor.astype(np.float32) for name, tensor in tensors.items() if ".polyattn." not in name}
    return Checkpoint(architecture, config, own, polynomials)


def _polynomial(place: str, saved: dict[str, Any] | None, tensors: dict[str, np.ndarray]) -> PolynomialLayer | None:
    if saved is None or place not in saved["modules"]:
        return None
    prefix = f"{place}.polyattn."
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    unknown = sorted(set(found) - KNOWN)
    if unknown:
        raise InputError(f"{place} has {unknown[0]!r}, which private inference does not know")
    return PolynomialLayer(
        spec=Polynomial.parse(saved["modules"][place]),
        interval=saved["interval"],
        clamp=bool(saved["clamp"]),
        moments=saved["row_shift"] == "moments",
        shifted=saved["row_shift"] != "none",
        tensors={name: tensor.astype(np.float64) for name, tensor in found.items() if name != "settings"},
    )
