"""Trains a translation model with polynomial attention beside its softmax original, from a checkpoint or from scratch.

    accelerate launch recipes/translation.py --model Helsinki-NLP/opus-mt-en-de --dataset bentrevett/multi30k \
        --spec softmax poly4-l1 --max_steps 500 --output_dir outputs/en-de

Marian, BART and other models of `AutoModelForSeq2SeqLM`. Self-attention becomes polynomial, and cross-attention too.
Translations of the held-out sentences are searched for with beams and the cache, and measured by BLEU and chrF.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from hf_polyattn import InputError
from parts.arguments import FinetuningArguments
from parts.finetuning import finetune
from parts.runs import errors_in_a_line, read_arguments
from parts.scratch import TOKENIZER_ROWS, maker, read_config, tokenizer_of
from parts.sources import DataArguments, Rows, read_rows
from parts.task import Task

IGNORED = -100  # a label that has no loss
COLUMNS = {
    "bleu": "BLEU of the translations, by sacrebleu (13a tokens, mixed case); 100 is the reference",
    "chrf": "chrF2 of the translations, by sacrebleu; 100 is the reference",
    "nll": "negative log-likelihood of a token of the reference in nats, mean over all of them",
}


@dataclasses.dataclass
class PairArguments(DataArguments):
    """The sentences and their translations."""

    source_column: str = dataclasses.field(
        default="en", metadata={"help": 'column of what is translated; of a nested column such as "translation.en"'}
    )
    target_column: str = dataclasses.field(default="de", metadata={"help": "column of the translations"})
    target_dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "where the translations are, row by row, if not in --dataset"}
    )
    target_eval_dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "where those of --eval_dataset are, if not in it"}
    )
    max_length: int = dataclasses.field(default=128, metadata={"help": "longer sides are cut to so many tokens"})
    num_beams: int = dataclasses.field(default=4, metadata={"help": "of the search for a translation; 1: greedy"})
    cross_attention: bool = dataclasses.field(default=True, metadata={"help": "make cross-attention polynomial, too"})


def main() -> None:
    arguments, data = read_arguments((FinetuningArguments, PairArguments))
    config = read_config(arguments)
    check(config, arguments, data)
    arguments.include_num_input_tokens_seen = "non_padding"

    # Data: both sides become token ids.
    with arguments.main_process_first(desc="data"):
        train, held_out = read_pairs(data)
        sides = (data.source_column, data.target_column)
        tokenizer = tokenizer_of(
            arguments, config, (row[side] for row in islice(train, TOKENIZER_ROWS) for side in sides)
        )
        lengths = [len(text) for text in held_out[data.source_column]]
        held_out = held_out.select(sorted(range(len(lengths)), key=lengths.__getitem__))  # less padding
        references = list(held_out[data.target_column])
        encode = partial(encode_rows, tokenizer=tokenizer, sides=sides, max_length=data.max_length)
        train, held_out = (rows.map(encode, batched=True, remove_columns=list(sides)) for rows in (train, held_out))

    # Softmax baseline, patch, calibrate, anneal, fine-tune, evaluate, save, push.
    finetune(
        Task(
            data={**dataclasses.asdict(data), "held_out_examples": len(held_out)},
            load_model=load_model,
            make_model=maker(AutoModelForSeq2SeqLM, config, arguments),
            patch_options={"cross_attention": data.cross_attention},
            processor=tokenizer,
            train=train,
            held_out=held_out,
            collate=partial(collate, padding=tokenizer.pad_token_id, start=config.decoder_start_token_id),
            predict=log_likelihoods,
            generate=partial(translate, beams=data.num_beams, longest=data.max_length, padding=tokenizer.pad_token_id),
            score=partial(score, tokenizer=tokenizer, references=references),
            columns=COLUMNS,
            unit="tokens",
        ),
        arguments,
    )


def load_model(source: str, dtype: str) -> PreTrainedModel:
    """Returns a checkpoint's model, whose fixed position embeddings stay fixed.

    Transformers loads Marian's sinusoids as if they were to be trained, and leaves them out when it saves.
    """
    model = AutoModelForSeq2SeqLM.from_pretrained(source, dtype=dtype)
    for name in model._keys_to_ignore_on_save or ():
        if name in dict(model.named_parameters()):
            model.get_parameter(name).requires_grad_(False)
    return model


def check(config: PreTrainedConfig, arguments: FinetuningArguments, data: PairArguments) -> None:
    """Raises InputError if a model of the config cannot translate sentences of this length."""
    if not config.is_encoder_decoder:
        raise InputError(
            f"{arguments.model} is a {config.model_type} without encoder and decoder; translation needs both"
        )
    context = getattr(config, "max_position_embeddings", data.max_length)
    if not 2 <= data.max_length <= context:
        raise InputError(
            f"--max_length {data.max_length} does not fit the context of {arguments.model}; set 2 to {context} tokens"
        )
    if data.num_beams < 1:
        raise InputError(f"--num_beams must be 1 or more, got {data.num_beams}")


def read_pairs(data: PairArguments) -> tuple[Rows, Rows]:
    """Returns the rows to train on and the held-out ones, with both sides in columns of their own.

    Raises:
        InputError: there are none, the sides are not as long, or one of a pair is empty.
    """
    sides = [data.source_column, data.target_column]
    if data.target_dataset is None and data.target_eval_dataset is None:
        found = read_rows(data, sides)
    else:
        if data.target_dataset is None or (data.eval_dataset is None) != (data.target_eval_dataset is None):
            raise InputError(
                "--target_dataset goes with --dataset and --target_eval_dataset with --eval_dataset: set both"
            )
        other = dataclasses.replace(data, dataset=data.target_dataset, eval_dataset=data.target_eval_dataset)
        halves = (read_rows(data, sides[:1]), read_rows(other, sides[1:]))
        if data.source_column == data.target_column:  # as in two files of lines
            data.source_column, data.target_column = "source", "target"
            halves = tuple(
                tuple(rows.rename_column(column, new) for rows in half)
                for half, column, new in zip(halves, sides, ("source", "target"), strict=True)
            )
        found = tuple(beside(*pair) for pair in zip(*halves, strict=True))
    for rows in found:
        require_both(rows, data.source_column, data.target_column)
    return found


def beside(source: Dataset, target: Dataset) -> Dataset:
    """Returns two sides, row by row, as pairs; raises InputError if they are not as long."""
    if len(source) != len(target):
        raise InputError(f"{len(source)} sentences and {len(target)} translations are no pairs; give one for each")
    return concatenate_datasets([source, target], axis=1)


def require_both(rows: Dataset, *sides: str) -> None:
    """Raises InputError if a side of a pair is empty, or is no text."""
    for side in sides:
        for row, text in enumerate(rows[side]):
            if text is None or (isinstance(text, str) and not text.strip()):
                raise InputError(f"row {row} has an empty {side!r}; leave such pairs out")
            if not isinstance(text, str):
                raise InputError(f"row {row} has a {type(text).__name__} in {side!r}, where a text is expected")


def encode_rows(
    rows: dict[str, list[Any]], *, tokenizer: Any, sides: tuple[str, str], max_length: int
) -> dict[str, list[Any]]:
    """Returns both sides as token ids, cut to `max_length`."""
    source, target = (rows[side] for side in sides)
    cut = {"truncation": True, "max_length": max_length}
    return {
        "input_ids": tokenizer(source, **cut)["input_ids"],
        "labels": tokenizer(text_target=target, **cut)["input_ids"],
    }


def collate(examples: list[dict[str, Any]], *, padding: int, start: int) -> dict[str, Tensor]:
    """Returns a batch, padded on the right; the decoder sees the labels after the mark of start."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(example[name]) for example in examples], batch_first=True, padding_value=value
        )
        for name, value in (("input_ids", padding), ("labels", IGNORED))
    )
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    decoder = F.pad(labels.masked_fill(labels == IGNORED, padding)[:, :-1], (1, 0), value=start)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder, "labels": labels}


def log_likelihoods(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns each row's sum of negative log-likelihoods and the number of its tokens, (rows, 2)."""
    labels = batch["labels"]
    losses = F.cross_entropy(outputs.logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.sum(1), (labels != IGNORED).sum(1)], dim=1)


def translate(model: PreTrainedModel, batch: Mapping[str, Tensor], *, beams: int, longest: int, padding: int) -> Tensor:
    """Returns the token ids of the best translations that beam search finds, padded to (rows, longest)."""
    ids = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        num_beams=beams,
        max_length=longest,
        min_length=0,
        do_sample=False,
        early_stopping=True,
        use_cache=True,
    )
    return F.pad(ids, (0, longest - ids.shape[1]), value=padding)


def score(rows: Tensor, *, tokenizer: Any, references: list[str]) -> dict[str, float]:
    """Returns the measures of the rows of all held-out pairs, in the order of their references."""
    from sacrebleu import corpus_bleu, corpus_chrf

    total, tokens = rows[:, :2].double().sum(0).tolist()
    translations = tokenizer.batch_decode(rows[:, 2:].long(), skip_special_tokens=True)
    return {
        "bleu": corpus_bleu(translations, [references]).score,
        "chrf": corpus_chrf(translations, [references]).score,
        "nll": total / tokens,
    }


if __name__ == "__main__":
    with errors_in_a_line():
        main()
