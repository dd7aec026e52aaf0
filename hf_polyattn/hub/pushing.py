"""The model card of a push: written where there is none, and kept where somebody edited it on the Hub.

`push_to_hub` of Transformers calls functions that know little of what was asked for; the hooks of `hub` tell them
through a context variable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError
from transformers.utils import logging

from ..patching.patched import spec_of
from .card_template import REPOSITORY, is_as_written, parse_card, sign, with_tags
from .cards import model_card

logger = logging.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Push:
    """What the caller of a push asked for.

    Attributes:
        card: a `ModelCard`; None for one without results.
        overwrite_card: whether to replace a card that was edited on the Hub.
        processor: a tokenizer or image processor for the same commit.
        tags: to add to the card.
        revision: branch; None for the main one.
        token: as huggingface_hub takes it.
    """

    card: ModelCard | None = None
    overwrite_card: bool = False
    processor: Any = None
    tags: tuple[str, ...] = ()
    revision: str | None = None
    token: Any = None


_CURRENT: ContextVar[Push | None] = ContextVar("polyattn_push", default=None)


@contextmanager
def pushing(push: Push) -> Iterator[None]:
    """Makes a push the current one inside the `with` block."""
    token = _CURRENT.set(push)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_push(token: Any = None) -> Push:
    """Returns the push that is going on; one that asks for nothing, as of this token, where none was announced."""
    return _CURRENT.get() or Push(token=token)


def write_card(model: Any, file: Path, repository: str | None, push: Push) -> None:
    """Writes the card that a push uploads, over the one that Transformers wrote.

    A card that somebody edited on the Hub is kept, byte for byte, unless `overwrite_card` is set. One that is as
    hf_polyattn wrote it is renewed by a card that was given, or if it is of other polynomials.

    Args:
        model: patched.
        file: README.md in the folder that is uploaded.
        repository: Hub id; None if nothing is pushed yet.
        push: what was asked for.
    """
    present = None if repository is None else _present_card(repository, push)
    known: Any = None if present is None else parse_card(present).data
    if present is not None and not push.overwrite_card:
        edited = not is_as_written(present)
        stale = not set(spec_of(model).split(", ")) <= set(known.tags or ())
        if edited and (push.card is not None or stale):
            logger.warning(f"the card of {repository} was edited there and is kept; overwrite_card=True replaces it")
        if edited or not (push.card is not None or stale):
            file.write_bytes(with_tags(present, push.tags).encode(errors="surrogateescape"))
            return
    card = push.card
    if card is None:
        card = model_card(
            model,
            base_model=getattr(known, "base_model", None),
            license=getattr(known, "license", None),
            language=getattr(known, "language", None),
            datasets=getattr(known, "datasets", None) or (),
            repository=repository or REPOSITORY,
        )
    card.save(file)  # its plot too, if it has one
    text = with_tags(str(card).replace(REPOSITORY, repository or REPOSITORY), push.tags)
    file.write_text(sign(text), encoding="utf-8", newline="")


def _present_card(repository: str, push: Push) -> str | None:
    """Returns the text of the card that a push would replace, None if there is none."""
    for revision in dict.fromkeys((push.revision, None)):
        try:  # not from the cache, which answers where the Hub does not, with a card that may have been edited since
            file = hf_hub_download(repository, "README.md", revision=revision, token=push.token, force_download=True)
        except RevisionNotFoundError:  # the push will start this branch from the main one
            continue
        except RemoteEntryNotFoundError:
            return None
        return Path(file).read_bytes().decode(errors="surrogateescape")
    return None
