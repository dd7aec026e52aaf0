"""The one template of model cards, `model_card.md`: filling it, and telling cards as written from edited ones."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TAGS = ("hf_polyattn", "polynomial-attention")
#: Stands for the Hub id in a card that was written before the model was pushed.
REPOSITORY = "<folder or Hub id>"
PLOT = "diagnosis.png"

_SIGNATURE = re.compile(r"\s*<!-- Written by hf_polyattn, ([0-9a-f]{16})\. [^>]*-->\s*$")


class PolynomialModelCard(ModelCard):
    """A `ModelCard` that draws its plot beside it when it is saved."""

    diagnosis: Any = None

    def save(self, filepath: str | os.PathLike[str]) -> None:
        """Writes the card, and `diagnosis.png` into the same folder if the card shows it."""
        super().save(Path(filepath))
        if self.diagnosis is not None:
            self.diagnosis.plot(Path(filepath).with_name(PLOT))


def load_card(source: str | Path) -> ModelCard:
    """Returns the card of a Hub id or a file, which need have no metadata.

    Raises:
        OSError, ValueError: there is none, or it cannot be read.
    """
    with _no_word_of_missing_metadata():
        card: ModelCard = ModelCard.load(source, ignore_metadata_errors=True)
    return card


def parse_card(text: str) -> ModelCard:
    """Returns the card of a text, which need have no metadata."""
    with _no_word_of_missing_metadata():
        return ModelCard(text, ignore_metadata_errors=True)


@contextmanager
def _no_word_of_missing_metadata() -> Iterator[None]:
    """Within, the Hub's client does not warn that a card has no metadata: cards of base models need none."""
    logger = logging.getLogger(ModelCard.__module__)
    logger.addFilter(_is_of_something_else)
    try:
        yield
    finally:
        logger.removeFilter(_is_of_something_else)


def _is_of_something_else(record: logging.LogRecord) -> bool:
    return "metadata block was not found" not in record.getMessage()


def fill_template(data: ModelCardData, **sections: str) -> PolynomialModelCard:
    """Returns a card: the template with this metadata and these sections.

    Args:
        data: the metadata.
        sections: title, introduction, measured, adaptation, limits, auto_class and repository.
    """
    template = files(__package__).joinpath("model_card.md").read_text(encoding="utf-8")
    return PolynomialModelCard(template.format(metadata=data.to_yaml(), **sections))


def introduction(base_model: str) -> str:
    """Returns what every card begins with."""
    return (
        f"{base_model} with its softmax attention replaced by polynomials of the attention scores, by hf_polyattn: no "
        "exponential,\nand without the row sum of an `l1` spec no division either."
    )


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a Markdown table."""
    header = list(header)
    first, *others = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([first, "|---" * len(header) + "|", *others])


def change(value: float, reference: float) -> str:
    """Returns by how many percent a value differs from a reference."""
    return f"{100 * (value / reference - 1):+.2f} %" if reference else ""


def sign(text: str) -> str:
    """Returns a card's text with a comment at its end by which `is_as_written` tells it from an edited one."""
    text = _SIGNATURE.sub("", text).rstrip() + "\n"
    return (
        f"{text}\n<!-- Written by hf_polyattn, {_digest(text)}. An edited card is kept when the model is pushed. -->\n"
    )


def is_as_written(text: str) -> bool:
    """Whether a card's text has been signed and not edited since."""
    found = _SIGNATURE.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.replace("\r\n", "\n").rstrip().encode()).hexdigest()[:16]


def with_tags(text: str, tags: Iterable[str]) -> str:
    """Returns a card's text with tags added to its metadata; the same text if it has them."""
    card = parse_card(text)
    data: Any = card.data
    present = data.tags or []
    missing = [tag for tag in dict.fromkeys(tags) if tag not in present]
    if not missing:
        return text
    data.tags = [*present, *missing]
    return sign(str(card)) if is_as_written(text) else str(card)
