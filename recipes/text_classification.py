"""Fine-tunes a text classifier with polynomial attention beside its softmax original.

    accelerate launch recipes/text_classification.py --model google-bert/bert-base-uncased --dataset stanfordnlp/sst2 \
        --text_column sentence --spec softmax poly6-l1 --num_train_epochs 2 --output_dir outputs/sst2

BERT and other models of `AutoModelForSequenceClassification`; a head for other labels is replaced by a new one. All
weights are trained, or with --lora_rank adapters, the polynomials and a new head.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import islice
from typing import Any

from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedConfig, PreTrainedModel

from hf_polyattn import InputError
from parts.arguments import FinetuningArguments
from parts.classification import COLUMNS, classifier_loader, labelled, load_metrics, new_modules, predict, scorer
from parts.finetuning import finetune
from parts.runs import errors_in_a_line, read_arguments
from parts.scratch import TOKENIZER_ROWS, maker, read_config, tokenizer_of
from parts.sources import DataArguments, label_index, label_names, read_rows
from parts.task import Task


@dataclasses.dataclass
class TextArguments(DataArguments):
    """The texts and their labels."""

    text_column: str = dataclasses.field(default="text", metadata={"help": "column that holds the texts"})
    pair_column: str | None = dataclasses.field(default=None, metadata={"help": "column that holds second texts"})
    label_column: str = dataclasses.field(default="label", metadata={"help": "column that holds numbers or names"})
    num_labels: int | None = dataclasses.field(default=None, metadata={"help": "how many labels; default: those found"})
    max_length: int | None = dataclasses.field(
        default=None, metadata={"help": "longer texts are cut to so many tokens; default: the context, or 512"}
    )
    metrics: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "of the evaluate library, beside accuracy and macro_f1"}
    )
    streaming: bool = dataclasses.field(default=False, metadata={"help": "read the texts as they are needed"})


def main() -> None:
    arguments, data = read_arguments((FinetuningArguments, TextArguments))
    config = read_config(arguments)
    arguments.include_num_input_tokens_seen = "non_padding"

    # Data: texts become token ids, labels whole numbers.
    texts = [data.text_column] + ([data.pair_column] if data.pair_column else [])
    with arguments.main_process_first(desc="data"):
        train, held_out = read_rows(data, [*texts, data.label_column], streaming=data.streaming)
        names = label_names(train, data.label_column, data.num_labels)
        read = (row[column] for row in islice(train, TOKENIZER_ROWS) for column in texts)
        tokenizer = tokenizer_of(arguments, config, read)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        max_length = check_length(arguments.model, config, tokenizer, data.max_length)
        encode = partial(
            encode_rows, tokenizer=tokenizer, texts=texts, labels=(data.label_column, names), max_length=max_length
        )
        train, held_out = (
            rows.map(encode, batched=True, remove_columns=[*texts, data.label_column]) for rows in (train, held_out)
        )
        lengths = [len(ids) for ids in held_out["input_ids"]]
        held_out = held_out.select(sorted(range(len(lengths)), key=lengths.__getitem__))  # less padding

    # Softmax baseline, patch, calibrate, anneal, fine-tune, evaluate, save, push.
    load = classifier_loader(AutoModelForSequenceClassification, names)
    finetune(
        Task(
            data={**dataclasses.asdict(data), "labels": names, "held_out_examples": len(held_out)},
            load_model=partial(load_padded, load=load, padding=tokenizer.pad_token_id),
            make_model=maker(AutoModelForSequenceClassification, labelled(config, names, arguments), arguments),
            processor=tokenizer,
            train=train,
            held_out=held_out,
            collate=DataCollatorWithPadding(tokenizer),
            predict=predict,
            score=scorer(load_metrics(data.metrics)),
            columns=COLUMNS,
            unit="tokens",
            new_modules=()
            if arguments.from_scratch
            else new_modules(AutoModelForSequenceClassification, arguments.model, names),
        ),
        arguments,
    )


def load_padded(source: str, dtype: str, *, load: Any, padding: int) -> PreTrainedModel:
    """Returns a model that knows the padding: decoders classify by the last token that is not."""
    model = load(source, dtype)
    model.config.pad_token_id = padding
    return model


def check_length(model: str, config: PreTrainedConfig, tokenizer: Any, length: int | None) -> int:
    """Returns the longest text in tokens.

    Raises:
        InputError: it is longer than the model's context.
    """
    positions = getattr(config, "max_position_embeddings", None)
    context = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
    if length is None:
        return min(512, context)
    if not 1 <= length <= context:
        raise InputError(f"--max_length {length} does not fit the context of {model}; set 1 to {context} tokens")
    return length


def encode_rows(
    rows: dict[str, list[Any]], *, tokenizer: Any, texts: list[str], labels: tuple[str, list[str]], max_length: int
) -> dict[str, list[Any]]:
    """Returns texts as token ids, cut to `max_length`, and labels as whole numbers; raises InputError of bad labels."""
    column, names = labels
    columns = [["" if text is None else text for text in rows[name]] for name in texts]
    found = [label_index(value, names, column) for value in rows[column]]
    return {**tokenizer(*columns, truncation=True, max_length=max_length), "labels": found}


if __name__ == "__main__":
    with errors_in_a_line():
        main()
