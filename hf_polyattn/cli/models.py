"""Commands that look at a model, or make a polynomial one and save it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import written_beside
from .arguments import Model, Output, Source, with_source


def describe(model: Model) -> None:
    """Print every attention module of a model: its heads, and its polynomial, or why it cannot have one."""
    from ..examples import load_model
    from ..patching.description import describe as describe_model

    typer.echo(describe_model(load_model(model, "cpu")))


def polynomials(
    model: Model,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write all of it to, in full precision.")
    ] = None,
) -> None:
    """Print the polynomial of every layer and head of a model: coefficients, interval, degree, multiplicative depth."""
    from ..diagnosis.polynomials import polynomials as polynomials_of
    from ..examples import load_model

    found = polynomials_of(load_model(model, "cpu"))
    typer.echo(found)
    if json_file is not None:
        with written_beside(json_file) as partial:
            partial.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
        typer.echo(f"written to {json_file}")


@with_source()
def patch(
    source: Source,
    output: Output,
    spec: Annotated[str, typer.Option(help="The polynomial, for example poly3, poly6-l1 or poly3^16-l1.")] = "poly6-l1",
    floor: Annotated[
        float | None,
        typer.Option(help="Choose the cheapest spec for each layer that keeps this quality, 1 is softmax."),
    ] = None,
) -> None:
    """Load a softmax model, make its attention polynomial, calibrate it on a data set, and save it."""
    from ..adaptation.calibration import calibrate as calibrate_model
    from ..adaptation.conversion import convert
    from ..patching.patch import patch_model

    model, processor = source.load_model()
    patch_model(model, spec)
    batches = source.read_batches(processor)
    if floor is None:
        typer.echo(calibrate_model(model, batches, max_batches=None))
        _say_similarity(model, batches)
    else:
        typer.echo(convert(model, batches, floor=floor, max_batches=source.batches))
    _save(model, processor, output)


@with_source()
def calibrate(
    source: Source,
    output: Output,
    spec: Annotated[str | None, typer.Option(help="Another polynomial to change to; default: the model's.")] = None,
) -> None:
    """Calibrate a polynomial model again, on other data or to another polynomial, and save it."""
    from ..adaptation.calibration import calibrate as calibrate_model

    model, processor = source.load_model()
    batches = source.read_batches(processor)
    typer.echo(calibrate_model(model, batches, spec=spec, max_batches=None))
    _say_similarity(model, batches)
    _save(model, processor, output)


@with_source(batches=8)
def diagnose(
    source: Source,
    output: Annotated[Path | None, typer.Option(help="Folder for diagnosis.json and diagnosis.png.")] = None,
) -> None:
    """Print how the attention of a polynomial model compares with softmax's on a data set: norms, scores, NaNs."""
    from ..diagnosis import diagnose as diagnose_model

    model, processor = source.load_model()
    found = diagnose_model(model, source.read_batches(processor), max_batches=source.batches)
    typer.echo(found)
    if output is not None:
        with written_beside(output / "diagnosis.json") as partial:
            partial.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
        found.plot(output / "diagnosis.png")
        typer.echo(f"written to {output}: diagnosis.json and diagnosis.png")


def explore(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(help="Data set to calibrate on, as of `patch`; texts and images can be given on the page."),
    ] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of the data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    column: Annotated[str | None, typer.Option(help="Column of texts or images.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="How many texts or images to take.")] = 64,
    host: Annotated[str, typer.Option(help="Address to listen on; default: this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    device: Annotated[str | None, typer.Option(help="Where to run; default: a GPU if there is one.")] = None,
) -> None:
    """Look at a model in the browser: turn the dial, compare with softmax what it attends to and says, and save it."""
    from ..examples import read_examples
    from ..explore import Session
    from ..explore.command import is_loopback, serve

    session = Session(model, device)
    if data is not None:
        session.examples = read_examples(session.processor, data, config, split, column, examples)
    if not is_loopback(host):
        typer.echo(f"warning: whoever reaches {host} can use the model and save to this machine", err=True)
    serve(session, host, port, lambda address: typer.echo(f"exploring {model} at {address} (Ctrl-C ends it)"))


def _say_similarity(model: Any, batches: list[Any]) -> None:
    from ..adaptation.quality import similarity

    typer.echo(f"similarity to softmax on the same data: {similarity(model, batches):.4f} (1 is softmax)")


def _save(model: Any, processor: Any, output: Path) -> None:
    with written_beside(output) as partial:
        model.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
    typer.echo(f"saved to {output}; it loads with from_pretrained after `import hf_polyattn`")
