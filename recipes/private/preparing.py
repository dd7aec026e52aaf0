"""What is done before anything is secret, with torch: arms are patched, calibrated and saved with their outputs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor

import hf_polyattn as hp
from hf_polyattn import InputError
from hf_polyattn.files import written_beside

CLAMP_FREE = " clamp-free"
STEP = 8  # tokens by which the lengths of a file's rows differ
TRAINED_TOKENS = 1024  # in a step of distillation, whatever its length


@dataclass(frozen=True, slots=True)
class Arm:
    """One way for the model's attention: `softmax`, or a spec that may be followed by " clamp-free"."""

    name: str

    @property
    def folder(self) -> str:
        """Where it is saved, in the output folder."""
        return self.name.replace(" ", "_")

    @property
    def config(self) -> hp.PolyAttentionConfig:
        """Its polynomial."""
        clamp = False if self.name.endswith(CLAMP_FREE) else None
        return hp.PolyAttentionConfig(self.name.removesuffix(CLAMP_FREE), clamp=clamp)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Texts:
    """Sequences without padding, a batch a tensor (B, T).

    Attributes:
        calibration: to calibrate on.
        training: to distill on.
        held_out: to measure quality on.
        samples: of the held-out ones, one a length, to run among parties: (1, T).
    """

    calibration: list[Tensor]
    training: list[Tensor]
    held_out: list[Tensor]
    samples: list[Tensor]


def prepare(
    source: str,
    name: str,
    texts: Texts,
    arms: list[str],
    steps: int,
    rates: tuple[float | None, float | None],
    output: Path,
    layers: int | None,
) -> dict[str, Any]:
    """Saves each arm, what it makes of the samples, and how close it is to softmax in plain text.

    Args:
        source: folder or Hub name of a softmax BertModel or GPT2LMHeadModel.
        name: of the model, for people.
        texts: what to calibrate on and to measure with.
        arms: `softmax` first, then the others.
        steps: of distillation, for the arms without a clamp.
        rates: its peak learning rates, of the weights and of the polynomials; None for those of `distill`.
        output: folder that is written.
        layers: only so many of the first ones; None for all.

    Returns:
        What prepared.json says.
    """
    about: dict[str, Any] = {"model": name, "layers": layers, "distillation_steps": steps, "arms": {}}
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if torch.cpu._is_avx512_bf16_supported() else "no")
    about |= {"learning_rates": rates, "trained_in": accelerator.mixed_precision}
    expected: list[Tensor] | None = None
    with written_beside(output) as partial:
        partial.mkdir()
        for arm in map(Arm, arms):
            model = load(source, layers)
            report = None
            if arm.name != "softmax":
                hp.patch_model(model, arm.config)
                batches = [{"input_ids": batch} for batch in texts.calibration]
                report = hp.calibrate(model, batches, max_batches=None, progress=False)
                if steps and arm.name.endswith(CLAMP_FREE):
                    training = [{"input_ids": batch} for batch in texts.training]
                    hp.distill(
                        model, training, steps=steps, lr=rates[0], coefficient_lr=rates[1], accelerator=accelerator
                    )
                    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # float32 again
            outputs = [answer(model, batch) for batch in texts.held_out]
            expected = outputs if expected is None else expected
            model.save_pretrained(partial / arm.folder)
            samples = {f"output{i}": answer(model, sample).numpy() for i, sample in enumerate(texts.samples)}
            np.savez(partial / arm.folder / "reference.npz", **samples)
            about["arms"][arm.name] = {
                **quality(model, texts.held_out, outputs, expected),
                "distilled": bool(steps and arm.name.endswith(CLAMP_FREE)),
                "explained_variance": None
                if report is None
                else float(np.mean([layer.explained_variance for layer in report.layers])),
            }
            print(arm.name, about["arms"][arm.name], flush=True)
        np.savez(partial / "samples.npz", **{f"tokens{i}": x.numpy() for i, x in enumerate(texts.samples)})
        (partial / "prepared.json").write_text(json.dumps(about, indent=1) + "\n")
    return about


def load(name: str, layers: int | None) -> Any:
    """Returns the softmax model, in eval mode."""
    config = transformers.AutoConfig.from_pretrained(name)
    if config.model_type not in ("bert", "gpt2"):
        raise InputError(f"{name} is of type {config.model_type!r}; private inference has 'bert' and 'gpt2'")
    extra = {} if layers is None else {"num_hidden_layers": layers}
    kind: Any = transformers.AutoModel if config.model_type == "bert" else transformers.AutoModelForCausalLM
    return kind.from_pretrained(name, **extra).eval()


@torch.no_grad()
def answer(model: Any, tokens: Tensor) -> Tensor:
    """Returns hidden states (B, T, F), or a language model's logits (B, T, vocabulary)."""
    return model(input_ids=tokens)[0]  # type: ignore[no-any-return]


def quality(model: Any, batches: list[Tensor], outputs: list[Tensor], expected: list[Tensor]) -> dict[str, Any]:
    """Returns the mean cosine of mean hidden states to softmax's, or the NLL of a token; in plain text."""
    if model.config.model_type == "gpt2":
        pairs = list(zip(batches, outputs, strict=True))
        losses = [
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
            for tokens, logits in pairs
        ]
        return {"nll": float(sum(losses) / sum(tokens[:, 1:].numel() for tokens in batches))}
    cosines = [
        torch.cosine_similarity(found.mean(1), wanted.mean(1)) for found, wanted in zip(outputs, expected, strict=True)
    ]
    by_length: dict[str, dict[str, float]] = {}
    for batch, found in zip(batches, cosines, strict=True):
        by_length[str(batch.shape[1])] = {"mean": float(found.mean()), "worst": float(found.min())}
    return {"cosine": float(torch.cat(cosines).mean()), "by_length": by_length}


def pieces(sentences: Iterator[str], tokenizer: Any, length: int, count: int) -> Tensor:
    """Returns `count` sequences of whole sentences, one after the other and cut: (count, length)."""
    rows = []
    while len(rows) < count:
        text, tokens = "", []
        while len(tokens) < length:
            sentence = next(sentences, None)
            if sentence is None:
                raise InputError(f"the sentences are too few for {count} sequences of {length} tokens")
            text = f"{text} {sentence}".strip()
            tokens = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        rows.append(tokens)
    return torch.tensor(rows)


def shuffled(sentences: list[str]) -> Iterator[str]:
    """Yields sentences for ever, in another order each time."""
    generator = random.Random(0)
    while True:
        yield from generator.sample(sentences, len(sentences))


def by_length(rows: list[list[int]]) -> list[Tensor]:
    """Returns token rows, cut to a multiple of `STEP` tokens, as batches of equal lengths and without padding."""
    cut = [row[: len(row) // STEP * STEP] for row in rows if len(row) >= STEP]
    lengths = sorted({len(row) for row in cut})
    return [torch.tensor([row for row in cut if len(row) == length]) for length in lengths]
