"""Shorter texts from those that are given, so that a calibration holds for other lengths than the data's.

A row's log partition sum grows with the number of keys that it sees. Where all rows of the data see as many, as in
blocks of 512 tokens for an encoder, nothing tells how. Causal rows see all numbers of keys, images one only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..patching.masking import real_positions
from ..patching.patched import patched_layers, pretrained_model

SHORTEST = 16  # tokens of a crop
_NO_INPUTS = ("labels", "label", "return_loss")  # which a crop goes without


def with_crops(model: nn.Module, batches: list[Any], crop: bool | None) -> list[Any]:
    """Returns batches of a patched model, and crops of them behind.

    Every text is cut once, into pieces of a half, a quarter, … of the longest one's tokens, down to 16, one size after
    the other; pieces begin and end with the tokens that the text does ([CLS] and [SEP]).

    Args:
        model: patched.
        batches: model inputs, see `calibrate`.
        crop: None adds crops where the model is a text encoder and its texts all have about one length.

    Raises:
        CalibrationError: crop is True, and these are no inputs that can be cropped.
    """
    if crop is False:
        return batches
    reason = _why_not(model, batches)
    if reason is None:
        counts = [count for batch in batches for count in _lengths(_texts(model, batch))]
        longest = max(counts)
        if longest < 2 * SHORTEST:
            reason = f"the longest text has {longest} tokens, and a crop at least {SHORTEST}"
        elif crop or 2 * min(counts) > longest:
            return batches + _crops(model, batches, longest)
    if crop and reason:
        raise CalibrationError(f"crop=True, but {reason}; calibrate on batches of several lengths, without crop")
    return batches


def _why_not(model: nn.Module, batches: list[Any]) -> str | None:
    root = pretrained_model(model)
    modules = dict(root.named_modules())
    if root.main_input_name != "input_ids":
        return f"{type(root).__name__} takes {root.main_input_name}, not texts"
    if root.config.is_encoder_decoder or any(
        getattr(modules[path], "is_causal", False) for path, _ in patched_layers(model)
    ):
        return f"{type(root).__name__} has causal rows, which see all numbers of keys as it is"
    for batch in batches:
        texts = _texts(model, batch)
        shape = getattr(texts.get("input_ids"), "shape", None)
        others = [
            name for name, value in texts.items() if not isinstance(value, Tensor) or value.shape[:2] != shape
        ] + [name for name in texts if name == "position_ids"]
        if shape is None or others:
            return f"batches have {others or 'no input_ids'}, which cannot be cut with the tokens"
    return None


def _texts(model: nn.Module, batch: Any) -> dict[str, Any]:
    if isinstance(batch, Tensor):
        batch = {pretrained_model(model).main_input_name: batch}
    if not isinstance(batch, Mapping):
        return {}
    return {name: value for name, value in batch.items() if name not in _NO_INPUTS}


def _real(texts: Mapping[str, Tensor]) -> Tensor:
    """Returns which tokens are no padding, bool (B, T)."""
    real = real_positions(texts)
    return torch.ones_like(texts["input_ids"], dtype=torch.bool) if real is None else real.bool()


def _lengths(texts: Mapping[str, Tensor]) -> list[int]:
    return [int(count) for count in _real(texts).sum(-1).tolist()]


def _crops(model: nn.Module, batches: list[Any], longest: int) -> list[dict[str, Tensor]]:
    sizes = []
    while (longest := longest // 2) >= SHORTEST:
        sizes.append(longest)
    pieces: dict[int, list[dict[str, Tensor]]] = {size: [] for size in sizes}
    found, number = [], 0
    for batch in batches:
        texts = _texts(model, batch)
        for entry, real in enumerate(_real(texts)):
            size = sizes[number % len(sizes)]
            number += 1
            pieces[size] += _pieces({name: value[entry][real] for name, value in texts.items()}, size)
        for of_size in pieces.values():
            if of_size:  # as many tokens as of the batch, or less
                found.append({name: torch.stack([piece[name] for piece in of_size]) for name in of_size[0]})
                of_size.clear()
    return found


def _pieces(text: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Returns the whole pieces of one text, of which each tensor is (T, …)."""
    count = len(text["input_ids"]) // size
    cut = {name: value[: count * size].reshape(count, size, *value.shape[1:]).clone() for name, value in text.items()}
    cut["input_ids"][:, 0], cut["input_ids"][:, -1] = text["input_ids"][0], text["input_ids"][-1]
    return [{name: value[number] for name, value in cut.items()} for number in range(count)]
