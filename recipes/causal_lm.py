"""Fine-tunes a causal language model with polynomial attention beside its softmax original.

    accelerate launch recipes/causal_lm.py --model openai-community/gpt2 --dataset Salesforce/wikitext \
        --dataset_config wikitext-2-raw-v1 --spec softmax poly6-l1 --max_steps 500 --output_dir outputs/gpt2

GPT-2, Llama and other models of `AutoModelForCausalLM`. All weights are trained, or with --lora_rank adapters and the
polynomials. Documents are packed into blocks, or with --pack false each is an example.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_polyattn import InputError
from parts.arguments import FinetuningArguments
from parts.finetuning import finetune
from parts.runs import errors_in_a_line, read_arguments
from parts.sources import DataArguments, Rows, read_rows
from parts.task import Task

IGNORED = -100  # a label that has no loss


@dataclasses.dataclass
class TextArguments(DataArguments):
    """The documents and how they become examples."""

    text_column: str = dataclasses.field(default="text", metadata={"help": "column that holds the documents"})
    streaming: bool = dataclasses.field(default=False, metadata={"help": "read the documents as they are needed"})
    pack: bool = dataclasses.field(
        default=True, metadata={"help": "cut the documents, one after another, into blocks; else one an example"}
    )
    block_size: int | None = dataclasses.field(
        default=None, metadata={"help": "tokens in a block, or in a document at most; default: the context, or 1024"}
    )
    truncate: bool = dataclasses.field(
        default=False, metadata={"help": "with --pack false: cut documents that are longer"}
    )


def main() -> None:
    arguments, data = read_arguments((FinetuningArguments, TextArguments))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    block_size = check_block_size(arguments.model, data.block_size)
    arguments.include_num_input_tokens_seen = "all" if data.pack else "non_padding"

    # Data: documents become token ids, and these examples.
    with arguments.main_process_first(desc="data"):
        train, held_out = read_rows(data, [data.text_column], streaming=data.streaming)
        if data.pack:
            make = partial(blocks, tokenizer=tokenizer, column=data.text_column, size=block_size)
        else:
            longest = (block_size, data.truncate)
            make = partial(documents, tokenizer=tokenizer, column=data.text_column, longest=longest)
        train, held_out = (
            rows.map(make, batched=True, batch_size=1000, remove_columns=[data.text_column])
            for rows in (train, held_out)
        )
    require_examples(train, held_out, block_size)

    # Softmax baseline, patch, calibrate, anneal, fine-tune, evaluate, save, push.
    finetune(
        Task(
            data={**dataclasses.asdict(data), "block_size": block_size, "held_out_examples": len(held_out)},
            load_model=load_model,
            processor=tokenizer,
            train=train,
            held_out=held_out,
            collate=partial(collate, padding=tokenizer.pad_token_id, padded=not data.pack),
            predict=log_likelihoods,
            score=score,
            columns={
                "nll": "negative log-likelihood of a held-out token in nats, mean over all of them",
                "perplexity": "its exponential",
            },
            unit="tokens",
        ),
        arguments,
    )


def load_model(source: str, dtype: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)


def check_block_size(model: str, size: int | None) -> int:
    """Returns the longest example in tokens.

    Raises:
        InputError: it is longer than the model's context.
    """
    context = getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", None)
    if size is None:
        return min(1024, context or 1024)
    if not 2 <= size <= (context or size):
        raise InputError(f"--block_size {size} does not fit the context of {model}; set 2 to {context} tokens")
    return size


def token_ids(texts: list[str | None], tokenizer: Any, *, start: bool, end: bool) -> Iterator[list[int]]:
    """Yields the token ids of documents, with the tokenizer's marks of start and end, where it has them."""
    before = [tokenizer.bos_token_id] if start and tokenizer.bos_token_id is not None else []
    after = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    kept = [text for text in texts if text]
    for ids in tokenizer(kept, add_special_tokens=False, verbose=False)["input_ids"] if kept else []:
        yield [*before, *ids, *after]


def blocks(rows: dict[str, list[Any]], *, tokenizer: Any, column: str, size: int) -> dict[str, list[Any]]:
    """Returns documents as blocks of exactly `size` tokens; what is left over at the end is dropped.

    A document begins with the tokenizer's mark of start; if it has none, it ends with the mark of end.
    """
    marked = tokenizer.bos_token_id is not None
    ids = list(chain.from_iterable(token_ids(rows[column], tokenizer, start=marked, end=not marked)))
    return {"input_ids": [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]}


def documents(
    rows: dict[str, list[Any]], *, tokenizer: Any, column: str, longest: tuple[int, bool]
) -> dict[str, list[Any]]:
    """Returns each document, with its marks of start and end, as an example of its own.

    Raises:
        InputError: one is too long and is not to be cut.
    """
    size, truncate = longest
    examples = list(token_ids(rows[column], tokenizer, start=True, end=True))
    too_long = max(map(len, examples), default=0)
    if too_long > size and not truncate:
        raise InputError(f"a document has {too_long} tokens, more than {size}; raise --block_size or set --truncate")
    return {"input_ids": [ids[:size] for ids in examples]}


def require_examples(train: Rows, held_out: Rows, block_size: int) -> None:
    """Raises InputError if there is nothing to train or to measure on."""
    for name, rows in (("training", train), ("held-out", held_out)):
        if hasattr(rows, "__len__") and len(rows) == 0:
            raise InputError(f"the {name} text is empty, or has less than one block of {block_size} tokens")


def collate(examples: list[dict[str, Any]], *, padding: int, padded: bool) -> dict[str, Tensor]:
    """Returns a batch, padded on the right; padding has no loss and, unless blocks are all as long, a mask."""
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    lengths = torch.tensor([len(row) for row in ids])
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding)
    visible = torch.arange(input_ids.shape[1]) < lengths[:, None]
    batch = {"input_ids": input_ids, "labels": input_ids.masked_fill(~visible, IGNORED)}
    return {**batch, "attention_mask": visible.long()} if padded else batch


def log_likelihoods(outputs: Any, batch: Any) -> Tensor:
    """Returns each row's sum of negative log-likelihoods and the number of its tokens, (rows, 2)."""
    labels = batch["labels"][:, 1:]
    logits = outputs.logits[:, :-1].float().transpose(1, 2)
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.sum(1), (labels != IGNORED).sum(1)], dim=1)


def score(rows: Tensor) -> dict[str, float]:
    total, tokens = rows.double().sum(0).tolist()
    return {"nll": total / tokens, "perplexity": math.exp(min(total / tokens, 700.0))}


if __name__ == "__main__":
    with errors_in_a_line():
        main()
