"""Commands that hand a saved model, or the operator, to somebody else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError


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
    from ..examples import load_model, load_processor
    from ..hub.card_template import load_card
    from ..patching.core import is_patched

    loaded = load_model(str(model), "cpu")
    processor = load_processor(str(model), loaded)
    if not is_patched(loaded):
        raise InputError(f"{model} is a softmax model; `polyattn patch {model} OUTPUT --data …` makes it polynomial")
    card = load_card(model / "README.md") if (model / "README.md").is_file() else None
    try:
        url = loaded.push_to_hub(
            repository, private=private, revision=branch, card=card, overwrite_card=overwrite_card, processor=processor
        )
    except (OSError, RuntimeError) as error:  # of the network, or an answer of the Hub
        raise InputError(f"cannot push {model} to {repository!r}, no commit was made: {error}") from error
    typer.echo(f"pushed to {repository}: {url}")


def export_code(model: Annotated[Path, typer.Argument(help="Folder of a saved polynomial model.")]) -> None:
    """Write code beside a saved model that runs it without this package, for those who trust it."""
    from ..hub.remote_code import export_remote_code

    written = export_remote_code(model)
    typer.echo(f"written to {written}; trust_remote_code=True runs it where hf_polyattn is not installed")


def export_kernel(output: Annotated[Path, typer.Argument(help="Folder of the kernel; replaced if it is one.")]) -> None:
    """Write the operator as a kernel of the Hub, which the package `kernels` loads."""
    from ..hub.kernel import export_kernel as write_kernel

    typer.echo(f"written to {write_kernel(output)}; kernels.get_local_kernel loads it")
