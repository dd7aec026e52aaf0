"""The command line: `polyattn describe`, `patch`, `calibrate`, `diagnose`, `push`, `bench`, `build` and exports.

Models are local folders or Hub ids, data sets too; a saved model is whole or absent.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import InputError, PolyAttnError
from .files import written_beside
from .ops import BACKENDS

app = typer.Typer(
    name="polyattn",
    help="Polynomial attention for pretrained Transformers: patch, calibrate, look at and share models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Folder or Hub id of the model.")]
Output = Annotated[Path, typer.Argument(help="Folder to save the model to; replaced if it is there.")]


class Dtype(StrEnum):
    """Of what is timed."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


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
        from .examples import load_model, load_processor

        model = load_model(self.model, self.device)
        return model, load_processor(self.model, model)

    def read_batches(self, processor: Any) -> list[Any]:
        """Returns batches of model inputs."""
        from .examples import read_batches

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


@app.command()
def describe(model: Model) -> None:
    """Print every attention module of a model: its heads, and its polynomial, or why it cannot have one."""
    from .examples import load_model
    from .patching.description import describe as describe_model

    typer.echo(describe_model(load_model(model, "cpu")))


@app.command()
def polynomials(
    model: Model,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write all of it to, in full precision.")
    ] = None,
) -> None:
    """Print the polynomial of every layer and head of a model: coefficients, interval, degree, multiplicative depth."""
    from .diagnosis.polynomials import polynomials as polynomials_of
    from .examples import load_model

    found = polynomials_of(load_model(model, "cpu"))
    typer.echo(found)
    if json_file is not None:
        with written_beside(json_file) as partial:
            partial.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
        typer.echo(f"written to {json_file}")


@app.command()
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
    from .adaptation.calibration import calibrate as calibrate_model
    from .adaptation.conversion import convert
    from .patching.patch import patch_model

    model, processor = source.load_model()
    patch_model(model, spec)
    batches = source.read_batches(processor)
    if floor is None:
        typer.echo(calibrate_model(model, batches, max_batches=None))
    else:
        typer.echo(convert(model, batches, floor=floor, max_batches=source.batches))
    _save(model, processor, output)


@app.command()
@with_source()
def calibrate(
    source: Source,
    output: Output,
    spec: Annotated[str | None, typer.Option(help="Another polynomial to change to; default: the model's.")] = None,
) -> None:
    """Calibrate a polynomial model again, on other data or to another polynomial, and save it."""
    from .adaptation.calibration import calibrate as calibrate_model

    model, processor = source.load_model()
    typer.echo(calibrate_model(model, source.read_batches(processor), spec=spec, max_batches=None))
    _save(model, processor, output)


@app.command()
@with_source(batches=8)
def diagnose(
    source: Source,
    output: Annotated[Path | None, typer.Option(help="Folder for diagnosis.json and diagnosis.png.")] = None,
) -> None:
    """Print how the attention of a polynomial model compares with softmax's on a data set: norms, scores, NaNs."""
    from .diagnosis import diagnose as diagnose_model

    model, processor = source.load_model()
    found = diagnose_model(model, source.read_batches(processor), max_batches=source.batches)
    typer.echo(found)
    if output is not None:
        with written_beside(output / "diagnosis.json") as partial:
            partial.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
        found.plot(output / "diagnosis.png")
        typer.echo(f"written to {output}: diagnosis.json and diagnosis.png")


@app.command()
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
    from .examples import read_examples
    from .explore import Session
    from .explore.command import is_loopback, serve

    session = Session(model, device)
    if data is not None:
        session.examples = read_examples(session.processor, data, config, split, column, examples)
    if not is_loopback(host):
        typer.echo(f"warning: whoever reaches {host} can use the model and save to this machine", err=True)
    serve(session, host, port, lambda address: typer.echo(f"exploring {model} at {address} (Ctrl-C ends it)"))


@app.command()
def push(
    model: Annotated[Path, typer.Argument(help="Folder of a saved polynomial model.")],
    repository: Annotated[str, typer.Argument(help="Hub id to push to, for example me/bert-poly6.")],
    private: Annotated[bool, typer.Option(help="Make the repository private if it is new.")] = False,
    branch: Annotated[str | None, typer.Option(help="Branch to push to; default: main.")] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a model card that was edited on the Hub.")
    ] = False,
) -> None:
    """Upload a saved polynomial model with its card to the Hub, as the user who is logged in.

    The card is the folder's README.md if it has one.
    """
    from huggingface_hub import ModelCard

    from .examples import load_model, load_processor
    from .patching.core import is_patched

    loaded = load_model(str(model), "cpu")
    processor = load_processor(str(model), loaded)
    if not is_patched(loaded):
        raise InputError(f"{model} is a softmax model; `polyattn patch {model} OUTPUT --data …` makes it polynomial")
    card = ModelCard.load(model / "README.md") if (model / "README.md").is_file() else None
    try:
        url = loaded.push_to_hub(
            repository, private=private, revision=branch, card=card, overwrite_card=overwrite_card, processor=processor
        )
    except (OSError, RuntimeError) as error:  # of the network, or an answer of the Hub
        raise InputError(f"cannot push {model} to {repository!r}, no commit was made: {error}") from error
    typer.echo(f"pushed to {repository}: {url}")


@app.command()
def bench(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="Default: bfloat16, and float32 on a CPU.")] = None,
    backend: Annotated[str, typer.Option(help=f"Of the operator: auto, {', '.join(BACKENDS)}.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the median is taken.")] = 7,
    output: Annotated[Path, typer.Option(help="Folder of bench.json and bench.png.")] = Path("outputs/bench"),
    part: Annotated[list[str] | None, typer.Option(help="operator, models or memory; default: all three.")] = None,
    tune: Annotated[bool, typer.Option(help="First write a table of the fastest Triton configurations.")] = False,
    redraw: Annotated[
        Path | None, typer.Option(help="Time nothing: draw the picture of this bench.json again, beside it.")
    ] = None,
) -> None:
    """Verify polynomial attention and time it next to softmax on this machine."""
    from .bench import PARTS, run
    from .bench import redraw as draw_again
    from .ops.backends import check_name

    if redraw is not None:
        typer.echo(f"drawn: {draw_again(redraw)}")
        return
    names = None if dtype is None else [str(name) for name in dtype]
    check_name(backend)
    run(device, names, backend, repeats, output, parts=part or tuple(PARTS), tune=tune)


@app.command()
def build() -> None:
    """Compile the CPU kernels now instead of at first use."""
    from .ops.cpu.build import build as build_kernels

    typer.echo(build_kernels())


@app.command()
def export_code(model: Annotated[Path, typer.Argument(help="Folder of a saved polynomial model.")]) -> None:
    """Write code beside a saved model that runs it without this package, for those who trust it."""
    from .hub.remote_code import export_remote_code

    written = export_remote_code(model)
    typer.echo(f"written to {written}; trust_remote_code=True runs it where hf_polyattn is not installed")


@app.command()
def export_kernel(output: Annotated[Path, typer.Argument(help="Folder of the kernel; replaced if it is one.")]) -> None:
    """Write the operator as a kernel of the Hub, which the package `kernels` loads."""
    from .hub.kernel import export_kernel as write_kernel

    typer.echo(f"written to {write_kernel(output)}; kernels.get_local_kernel loads it")


def _save(model: Any, processor: Any, output: Path) -> None:
    with written_beside(output) as partial:
        model.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
    typer.echo(f"saved to {output}; it loads with from_pretrained after `import hf_polyattn`")


def main() -> None:
    """Runs `polyattn`; an error of the package ends it with its message and status 1."""
    try:
        app()
    except PolyAttnError as error:
        sys.exit(f"polyattn: {error}")


if __name__ == "__main__":
    main()
