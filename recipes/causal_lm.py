"""Fine-tunes a causal language model with polynomial attention beside its softmax original.

    accelerate launch recipes/causal_lm.py --model openai-community/gpt2 --dataset Salesforce/wikitext \
        --dataset_config wikitext-2-raw-v1 --spec softmax poly6-l1 --max_steps 500 --output_dir outputs/gpt2

GPT-2, Llama and other models of `AutoModelForCausalLM`; with --from_scratch their config alone, and new weights. All
weights are trained, or with --lora_rank adapters and the polynomials. Documents are packed into blocks, or with --pack
false each is an example.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_polyattn import InputError
from parts.arguments import FinetuningArguments
from parts.finetuning import finetune
from parts.runs import errors_in_a_line, read_arguments
from parts.scratch import TOKENIZER_ROWS, maker, read_config, tokenizer_of
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
    other_block_sizes: list[int] = dataclasses.field(
        default_factory=list, metadata={"help": "lengths of blocks on which the trained model is measured, too"}
    )
    truncate: bool = dataclasses.field(
        default=False, metadata={"help": "with --pack false: cut documents that are longer"}
    )


def main() -> None:
    arguments, data = read_arguments((FinetuningArguments, TextArguments))
    config = read_config(arguments)
    block_size, *others = check_block_sizes(arguments.model, config, [data.block_size, *data.other_block_sizes])
    if others and not data.pack:
        raise InputError("--other_block_sizes are of packed blocks; they do not go with --pack false")
    arguments.include_num_input_tokens_seen = "all" if data.pack else "non_padding"

    # Data: documents become token ids, and these examples.
    with arguments.main_process_first(desc="data"):
        train, held_out = read_rows(data, [data.text_column], streaming=data.streaming)
        texts = (row[data.text_column] for row in islice(train, TOKENIZER_ROWS))
        tokenizer = tokenizer_of(arguments, config, texts)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        column, make = data.text_column, partial(blocks, tokenizer=tokenizer, column=data.text_column)
        examples = partial(make, size=block_size)
        if not data.pack:
            examples = partial(documents, tokenizer=tokenizer, column=column, longest=(block_size, data.truncate))
        others = {str(size): in_examples(held_out, partial(make, size=size), column) for size in others}
        train, held_out = (in_examples(rows, examples, column) for rows in (train, held_out))
    require_examples({"training": train, "held-out": held_out, **others}, block_size)

    # Softmax baseline, patch, calibrate, anneal, fine-tune, evaluate, save, push.
    finetune(
        Task(
            data={**dataclasses.asdict(data), "block_size": block_size, "held_out_examples": len(held_out)},
            load_model=load_model,
            make_model=maker(AutoModelForCausalLM, config, arguments),
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
            other_held_out=others,
        ),
        arguments,
    )


def load_model(source: str, dtype: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype)


def check_block_sizes(model: str, config: PreTrainedConfig, sizes: list[int | None]) -> list[int]:
    """Returns how long examples are at most, in tokens.

    Raises:
        InputError: longer than the model's context.
    """
    context = getattr(config, "max_position_embeddings", None)
    found = [min(1024, context or 1024) if size is None else size for size in sizes]
    for size in found:
        if not 2 <= size <= (context or size):
            raise InputError(f"--block_size {size} does not fit the context of {model}; set 2 to {context} tokens")
    return found


def in_examples(rows: Rows, make: Callable[..., dict[str, list[Any]]], column: str) -> Rows:
    """Returns the examples that documents make."""
    return rows.map(make, batched=True, batch_size=1000, remove_columns=[column])


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


def require_examples(found: Mapping[str, Rows], block_size: int) -> None:
    """Raises InputError if there is nothing to train or to measure on."""
    for name, rows in found.items():
        if hasattr(rows, "__len__") and len(rows) == 0:
            size = name if name.isdigit() else block_size
            name = "held-out" if name.isdigit() else name
            raise InputError(f"the {name} text is empty, or has less than one block of {size} tokens")


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
