"""What a model says under softmax and under its polynomials, by what kind of model it is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..adaptation.capture import model_inputs
from ..adaptation.training import evaluating
from ..errors import InputError
from ..examples import encode
from ..patching.masking import real_positions
from ..patching.patch import softmax_attention
from ..patching.patched import pretrained_model
from ..tasks import loader_of

TOP = 5
CONTINUATION = 20
# By the model's task; all others are looked at by their embeddings.
_KINDS = {
    "fill-mask": "masked",
    "text-generation": "causal",
    "text-classification": "text classes",
    "image-classification": "image classes",
}


@dataclass(frozen=True, slots=True)
class Answers:
    """A table of what two models say.

    Attributes:
        title: what it shows.
        header: names of the columns.
        rows: cells, texts.
        note: what else is to be said, a sentence.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def kind_of(model: Any) -> str:
    """Returns "masked", "causal", "text classes", "image classes", or "embedding" for any other."""
    return _KINDS.get(loader_of(pretrained_model(model))[1], "embedding")


def answers(model: Any, processor: Any, examples: Sequence[Any], length: int) -> Answers:
    """Returns what a patched model says under softmax and under its polynomials.

    Args:
        model: patched.
        processor: its tokenizer or image processor.
        examples: texts or images; all of them are compared by models without a head, the others answer to the first.
        length: tokens that a text is cut to.

    Raises:
        InputError: a model that fills in masks, and no mask in the text.
    """
    kind = kind_of(model)
    with evaluating(model):
        if kind == "embedding":
            return _similarities(model, processor, examples, length)
        (inputs,) = encode(processor, list(examples[:1]), 1, length)
        inputs = model_inputs(model, inputs)
        if kind == "masked":
            return _masked(model, processor, inputs)
        if kind == "causal":
            return _next_tokens(model, processor, inputs)
        softmax, ours = (model_logits[0] for model_logits in _both(model, inputs))
        names = model.config.id2label
        return _ranking("Classes", softmax, ours, lambda number: str(names.get(number, number)))


def _both(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns logits or last hidden states under softmax and under the polynomials, float32."""
    found = []
    for context in (softmax_attention(model), nullcontext()):
        with context:
            output = model(**inputs)
        found.append((output.logits if "logits" in output else output.last_hidden_state).float())
    return found[0], found[1]


def _ranking(title: str, softmax: Tensor, ours: Tensor, name: Any, note: str = "") -> Answers:
    """Returns the likeliest of both side by side; logits (choices,)."""
    ranked = []
    for logits in (softmax, ours):
        top = logits.softmax(-1).topk(min(TOP, len(logits)))
        ranked.append([(name(int(i)), f"{float(p):.4f}") for p, i in zip(top.values, top.indices, strict=True)])
    rows = tuple((str(place), *left, *right) for place, (left, right) in enumerate(zip(*ranked, strict=True), 1))
    away = 0.5 * float((softmax.softmax(-1) - ours.softmax(-1)).abs().sum())
    said = f"Total variation between the two distributions: {away:.2g} (0 is the same, 1 is nothing in common)."
    return Answers(title, ("", "softmax", "p", "polynomial", "p"), rows, f"{said} {note}".strip())


def _masked(model: Any, processor: PreTrainedTokenizerBase, inputs: dict[str, Any]) -> Answers:
    places = (inputs["input_ids"][0] == processor.mask_token_id).nonzero()
    if len(places) == 0:
        raise InputError(f"write {processor.mask_token} where the model is to fill in a word")
    softmax, ours = (logits[0, int(places[0])] for logits in _both(model, inputs))
    return _ranking("Word at the mask", softmax, ours, lambda number: _token(processor, number))


def _next_tokens(model: Any, processor: PreTrainedTokenizerBase, inputs: dict[str, Any]) -> Answers:
    softmax, ours = (logits[0, -1] for logits in _both(model, inputs))
    said = []
    for context in (softmax_attention(model), nullcontext()):
        with context:
            written = model.generate(
                **inputs, max_new_tokens=_room(model, inputs), do_sample=False, pad_token_id=processor.pad_token_id
            )
        new = written[0, inputs["input_ids"].shape[1] :]
        said.append(processor.decode(new, skip_special_tokens=True).strip())
    note = f"Greedy continuation. Softmax: “{said[0]}” Polynomial: “{said[1]}”"
    return _ranking("Next token", softmax, ours, lambda number: _token(processor, number), note)


def _room(model: Any, inputs: dict[str, Any]) -> int:
    longest = getattr(model.config, "max_position_embeddings", None) or 2**30
    return int(max(1, min(CONTINUATION, longest - inputs["input_ids"].shape[1])))


def _token(processor: PreTrainedTokenizerBase, number: int) -> str:
    return repr(processor.decode([number]))


def _similarities(model: Any, processor: Any, examples: Sequence[Any], length: int) -> Answers:
    """Returns the cosines of all pairs of mean embeddings under both, and how far each embedding moved."""
    (inputs,) = encode(processor, list(examples), len(examples), length)
    inputs = model_inputs(model, inputs)
    real = real_positions(inputs)
    embedded = []
    for states in _both(model, inputs):
        weight = torch.ones(states.shape[:2]) if real is None else real.to(states.dtype)
        embedded.append(torch.nn.functional.normalize((states * weight[..., None].to(states)).sum(1), dim=-1))
    softmax, ours = embedded
    kept = (softmax * ours).sum(-1)
    rows = []
    for i in range(len(examples)):
        for j in range(i + 1, len(examples)):
            cosines = [float(rows_[i] @ rows_[j]) for rows_ in (softmax, ours)]
            rows.append((_short(examples, i), _short(examples, j), *(f"{cosine:.4f}" for cosine in cosines)))
    if not rows:
        rows.append((_short(examples, 0), "itself, under softmax", "1.0000", near_one(float(kept[0]))))
    note = (
        f"Cosine between an embedding and the softmax model's: {near_one(float(kept.min()))} at least. Embeddings are "
    )
    note += "means over tokens." + (" Give two or more to compare them with each other." if len(examples) == 1 else "")
    return Answers("Similarities", ("one", "other", "softmax", "polynomial"), tuple(rows), note)


def near_one(cosine: float) -> str:
    """Returns a cosine with four digits, or what it lacks to 1 where these would hide it."""
    lacking = 1.0 - cosine
    return f"1 − {lacking:.1e}" if 0.0 < lacking < 5e-4 else f"{cosine:.4f}"


def _short(examples: Sequence[Any], number: int) -> str:
    one = examples[number]
    if not isinstance(one, str):
        return f"image {number + 1}"
    return one if len(one) <= 48 else f"{one[:47]}…"
