"""`polyattn` itself: its commands in the order of its help, and what it does with an error."""

from __future__ import annotations

import sys

import typer

from ..errors import PolyAttnError
from . import machine, models, sharing

app = typer.Typer(
    name="polyattn",
    help="Polynomial attention for pretrained Transformers: patch, calibrate, look at and share models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    models.describe,
    models.polynomials,
    models.patch,
    models.calibrate,
    models.diagnose,
    models.explore,
    sharing.push,
    machine.bench,
    machine.build,
    sharing.export_code,
    sharing.export_kernel,
):
    app.command()(command)


def main() -> None:
    """Runs `polyattn`; an error of the package ends it with its message and status 1."""
    try:
        app()
    except PolyAttnError as error:
        sys.exit(f"polyattn: {error}")
