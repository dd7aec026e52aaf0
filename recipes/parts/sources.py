"""Rows to train and measure on: a Hub data set, a folder, or a local file, read whole or as a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, load_dataset

from hf_polyattn import InputError
from hf_polyattn.examples import FILE_FORMATS

Rows = Dataset | IterableDataset


@dataclasses.dataclass
class DataArguments:
    """Where the rows come from."""

    dataset: str = dataclasses.field(
        default="", metadata={"help": "Hub name, folder, or .parquet, .csv, .json, .jsonl, .txt file"}
    )
    dataset_config: str | None = dataclasses.field(default=None, metadata={"help": "configuration of the data set"})
    train_split: str = dataclasses.field(default="train", metadata={"help": 'such as "train" or "train[:90%]"'})
    eval_dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "where the held-out rows are; default: in --dataset"}
    )
    eval_split: str = dataclasses.field(default="validation", metadata={"help": "the held-out rows, as --train_split"})
    max_train_examples: int | None = dataclasses.field(default=None, metadata={"help": "rows to train on; default all"})
    max_eval_examples: int | None = dataclasses.field(default=None, metadata={"help": "held-out rows; default all"})


def read_rows(arguments: DataArguments, columns: Sequence[str], *, streaming: bool = False) -> tuple[Rows, Dataset]:
    """Returns the rows to train on and the held-out ones, with no columns but those that are asked for.

    Args:
        arguments: where they are.
        columns: that both must have; of a nested column such as "translation.en".
        streaming: read the training rows as they are needed; the held-out ones are always read whole.

    Raises:
        InputError: there is no such data set, split or column, or no row in it.
    """
    if not arguments.dataset:
        raise InputError("no --dataset given: a Hub name, a folder or a file")
    train = _read(arguments.dataset, arguments.dataset_config, arguments.train_split, columns, streaming)
    if arguments.max_train_examples is not None:
        train = train.take(arguments.max_train_examples)
    if arguments.eval_dataset is not None:
        held_out = _read(arguments.eval_dataset, None, arguments.eval_split, columns, False)
    elif arguments.eval_split == arguments.train_split or (
        Path(arguments.dataset).suffix in FILE_FORMATS and "[" not in arguments.train_split + arguments.eval_split
    ):
        raise InputError(
            "the held-out rows would be the training rows; set --eval_dataset, or parts that do not overlap, such as "
            ' --train_split "train[:90%]" --eval_split "train[90%:]"'
        )
    else:
        held_out = _read(arguments.dataset, arguments.dataset_config, arguments.eval_split, columns, False)
    if arguments.max_eval_examples is not None:
        held_out = held_out.take(arguments.max_eval_examples)
    return train, held_out


def _read(source: str, config: str | None, split: str, columns: Sequence[str], streaming: bool) -> Any:
    if streaming and "[" in split:
        raise InputError(f"a stream has no part {split!r}; set a whole split, and --max_train_examples for fewer rows")
    file_format = FILE_FORMATS.get(Path(source).suffix)
    try:
        if file_format is None:
            rows = load_dataset(source, config, split=split, streaming=streaming)
        else:
            files = {split.partition("[")[0]: source}
            rows = load_dataset(file_format, data_files=files, split=split, streaming=streaming)
    except (ValueError, OSError) as error:  # an unknown split or configuration; a missing file or data set
        raise InputError(f"cannot read split {split!r} of {source}: {error}") from error
    if isinstance(rows, DatasetDict) or (not streaming and len(rows) == 0):
        raise InputError(f"split {split!r} of {source} is empty")
    if any("." in column for column in columns):  # of a nested column, as the Hub has translations
        rows = rows.flatten()
    found = rows.column_names
    if found is None:  # a stream whose format does not say
        found = list(next(iter(rows), {}))
    missing = [column for column in columns if column not in found]
    if not found:
        raise InputError(f"split {split!r} of {source} is empty")
    if missing:
        raise InputError(f"{source} has no column {missing[0]!r}; it has {found}: set the --…_column arguments")
    return rows.select_columns(list(columns))


def label_names(rows: Rows, column: str, num_labels: int | None) -> list[str]:
    """Returns the names of the labels: those of the data set, else the different values in `column`, in order.

    Args:
        rows: to train on.
        column: whole numbers from 0, or names.
        num_labels: how many there are, if whole numbers; needed for a stream that does not say.

    Raises:
        InputError: a stream that does not say, or a label that is missing or negative.
    """
    feature = (rows.features or {}).get(column)
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if num_labels is not None:
        return [str(label) for label in range(num_labels)]
    if isinstance(rows, IterableDataset):
        raise InputError("a stream does not say how many labels there are; set --num_labels")
    values = rows.unique(column)
    if any(value is None for value in values):
        raise InputError(f"a row has no {column!r}; leave such rows out")
    if all(isinstance(value, int) for value in values):
        return [str(label) for label in range(max(values) + 1)]
    return sorted(map(str, values))


def label_index(value: Any, names: Sequence[str], column: str) -> int:
    """Returns a row's label as a whole number from 0.

    Raises:
        InputError: it is not one of the names, nor a number that stands for one.
    """
    if isinstance(value, int) and 0 <= value < len(names):
        return value
    if isinstance(value, str) and value in names:
        return names.index(value)
    raise InputError(
        f"label {value!r} in column {column!r} is out of range: there are {len(names)} labels, "
        f"{names[0]!r} … {names[-1]!r}; set --num_labels or leave the row out"
    )
