"""What several commands are given: a model, where to save one, and a model with examples for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Folder or Hub id of the model.")]
Output = Annotated[Path, typer.Argument(help="Folder to save the model to; replaced if it is there.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model and examples for it, by folder, file or Hub name; each field is an argument of a command."""

    model: Model
    data: Annotated[
        str, typer.Option(help="Data set: a Hub name, a folder, or a .parquet, .csv, .json, .jsonl or .txt file.")
    ]
    config: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train"
    column: Annotated[
        str | None, typer.Option(help="Column of texts or images; default: the first that can be one.")
    ] = None
    batches: Annotated[int, typer.Option(min=1, help="How many batches to use.")] = 16
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 8
    max_length: Annotated[int, typer.Option(min=1, help="Longer texts are cut to so many tokens.")] = 256
    device: Annotated[str | None, typer.Option(help="Where to run; default: a GPU if there is one.")] = None

    def load_model(self) -> tuple[Any, Any]:
        """Returns the model and the processor beside it."""
        from ..examples import load_model, load_processor

        model = load_model(self.model, self.device)
        return model, load_processor(self.model, model)

    def read_batches(self, processor: Any) -> list[Any]:
        """Returns batches of model inputs."""
        from ..examples import read_batches

        return read_batches(
            processor,
            self.data,
            self.config,
            self.split,
            self.column,
            self.batches,
            self.batch_size,
            self.max_length,
        )


def with_source(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the arguments of a `Source` in place of its parameter `source`.

    Args:
        **defaults: of this command, by field.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            command(source=Source(**{field.name: given.pop(field.name) for field in fields(Source)}), **given)

        of_source = inspect.signature(Source, eval_str=True).parameters.values()
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [part.replace(default=defaults.get(part.name, part.default)) for part in of_source]
        parameters += [part.replace(kind=part.KEYWORD_ONLY) for part in own if part.name != "source"]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {part.name: part.annotation for part in parameters}
        return run

    return decorate
