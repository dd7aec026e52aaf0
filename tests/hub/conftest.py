"""A loopback Hub, and processes that talk to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import json, sys, time, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)
{imports}
folder, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])

@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**inputs)[0]

def message(call, *words, **options):
    try:
        call(*words, **options)
    except Exception as error:
        return [type(error).__name__, str(error)]

def edit(repository, revision=None):
    "Adds a line to the card, as a person would on the web page."
    text = Path(huggingface_hub.hf_hub_download(repository, "README.md", revision=revision)).read_text() + "Mine."
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repository, revision=revision)
"""
PLUGIN = """
import huggingface_hub, transformers
import hf_polyattn as hp
api = huggingface_hub.HfApi()
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub({"hf_mine": "me", "hf_other": "other"}) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def process(hub: LoopbackHub, folder: Path) -> Callable[..., Any]:
    """`process(code, arguments, imports=PLUGIN, home="home")`: runs code in a new process, returns what it prints."""

    def run(code: str, arguments: Any = None, *, imports: str = PLUGIN, home: str = "home") -> Any:
        script = PRELUDE.format(imports=imports) + code
        variables = {**os.environ, **hub.environment("hf_mine", folder / home), "PYTHONPATH": str(ROOT)}
        variables["TRANSFORMERS_VERBOSITY"] = "warning"
        command = [sys.executable, "-c", script, str(folder), json.dumps(arguments)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not [request for request in hub.requests if request.status in (400, 501)]
        return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}

    return run
