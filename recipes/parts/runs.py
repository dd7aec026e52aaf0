"""What every recipe's run has: arguments that are read, files that are whole or absent, and where it ran."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import HfArgumentParser

from hf_polyattn import PolyAttnError, files
from hf_polyattn.errors import SaveError


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Ends the process with `error: …` and status 1 for what its user can put right."""
    try:
        yield
    except (PolyAttnError, OSError) as error:
        sys.exit(f"error: {error}")


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Lets models be loaded whole: under ZeRO-3 Transformers partitions them at once, and then none can be patched."""
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def read_arguments(types: tuple[type, ...]) -> list[Any]:
    """Returns the arguments from the command line, and from the YAML or JSON file that may be its first word.

    What the command line says goes before what the file says.
    """
    parser = HfArgumentParser(types)
    words = sys.argv[1:]
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        values = yaml.safe_load(Path(words.pop(0)).read_text())
        known = {field.name for type_ in types for field in dataclasses.fields(type_)}
        if not isinstance(values, dict) or not known.issuperset(values):
            parser.error(f"{sys.argv[1]} must map argument names to values; known names are {', '.join(sorted(known))}")
        parser.set_defaults(**values)
    return list(parser.parse_args_into_dataclasses(words))


@contextmanager
def written_beside(path: Path, accelerator: Accelerator | None = None) -> Iterator[Path]:
    """Yields a path to write to instead, which then takes the place of `path`: it is whole or absent.

    Several processes may write files of one folder; the main one renames it once all have come to the end.

    Args:
        path: file or folder; what is there is replaced.
        accelerator: of the processes that enter together; None for one process.

    Raises:
        SaveError: writing failed, for example because the disk is full.
    """
    main = accelerator is None or accelerator.is_main_process
    wait = accelerator.wait_for_everyone if accelerator is not None else lambda: None
    try:
        with files.written_beside(path) if main else nullcontext(files.partial_path(path)) as partial:
            wait()
            yield partial
            wait()
    except SaveError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise SaveError(
            f"{path} cannot be written: {error}. What was saved before it is kept; make room and run again."
        ) from error
    wait()


def write_beside(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file or folder through `written_beside`."""
    with written_beside(path) as partial:
        write(partial)


def write_json(file: Path, content: Any, accelerator: Accelerator) -> None:
    """Writes a JSON file once for all processes, which wait for it."""
    if accelerator.is_main_process:
        write_beside(file, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
    accelerator.wait_for_everyone()


def single_process() -> dict[str, str]:
    """Returns the environment without what makes a process one of several."""
    ours = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def versions() -> dict[str, str]:
    packages = ("hf_polyattn", "torch", "transformers", "accelerate", "datasets", "safetensors")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def describe_device(accelerator: Accelerator) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.machine()
    return {
        "type": accelerator.device.type,
        "name": name,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }


def peak_memory_mib() -> int:
    """Returns the largest resident memory of this process or of one that it started."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes on macOS, KiB elsewhere
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usage) // unit


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Puts down how long what is inside took."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
