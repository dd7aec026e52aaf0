"""How a run that was stopped goes on: with the same arguments, and each arm from its newest checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers.trainer_utils import get_last_checkpoint

from hf_polyattn import InputError

from .runs import write_json


def prepare_output(
    output: Path, specs: Sequence[str], decisive: dict[str, Any], resume: bool, accelerator: Accelerator
) -> None:
    """Prepares the output folder of a run: what a killed run was writing there is removed.

    Args:
        output: has a folder for each arm.
        specs: the arms.
        decisive: what a run has to share with the one that it goes on with, as JSON types or what becomes them.
        resume: whether to go on with the run that is there.
        accelerator: of the processes that enter together.

    Raises:
        InputError: arms of this run are in it, and it is not to be gone on with, or with other arguments.
    """
    arms = [folder for spec in specs if (folder := output / spec).exists()]
    if arms and not resume:
        raise InputError(f"{arms[0]} has a run in it; go on with --resume, or set another --output_dir")
    file = output / "arguments.json"
    decisive = json.loads(json.dumps(decisive))
    if resume and file.exists():
        before = json.loads(file.read_text())
        changed = [name for name in decisive if decisive[name] != before.get(name)]
        if changed:
            given = ", ".join(f"{name} was {before.get(name)}, is {decisive[name]}" for name in changed)
            raise InputError(f"--resume needs the arguments of the run in {output}: {given}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for partial in [partial for folder in arms for partial in folder.glob(".partial-*")]:
            shutil.rmtree(partial)
    write_json(file, decisive, accelerator)


def last_checkpoint(folder: Path) -> str | None:
    """Returns the newest checkpoint of an arm; one that was being written when its run was killed has no such name."""
    return get_last_checkpoint(str(folder)) if folder.exists() else None
