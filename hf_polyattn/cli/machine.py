"""Commands about this machine: how fast it is, and kernels compiled for it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..ops import BACKENDS


class Dtype(StrEnum):
    """Of what is timed."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def bench(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    dtype: Annotated[list[Dtype] | None, typer.Option(help="Default: bfloat16, and float32 on a CPU.")] = None,
    backend: Annotated[str, typer.Option(help=f"Of the operator: auto, {', '.join(BACKENDS)}.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of which the median is taken.")] = 7,
    output: Annotated[Path, typer.Option(help="Folder of bench.json and bench.png.")] = Path("outputs/bench"),
    part: Annotated[
        list[str] | None, typer.Option(help="operator, models, decode or memory, by default all four; or calibration.")
    ] = None,
    tune: Annotated[bool, typer.Option(help="First write a table of the fastest Triton configurations.")] = False,
    redraw: Annotated[
        Path | None, typer.Option(help="Time nothing: draw the picture of this bench.json again, beside it.")
    ] = None,
) -> None:
    """Verify polynomial attention and time it next to softmax on this machine."""
    from ..bench import USUAL, run
    from ..bench import redraw as draw_again
    from ..ops.backends import check_name

    if redraw is not None:
        typer.echo(f"drawn: {draw_again(redraw)}")
        return
    names = None if dtype is None else [str(name) for name in dtype]
    check_name(backend)
    run(device, names, backend, repeats, output, parts=part or USUAL, tune=tune)


def build() -> None:
    """Compile the CPU kernels now instead of at first use."""
    from ..ops.cpu.build import build as build_kernels

    typer.echo(build_kernels())
