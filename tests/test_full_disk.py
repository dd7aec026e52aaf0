"""What cannot be written leaves what was there, nothing half-written, and one line that says so.

The disk is full in a process of its own: no file may become longer than a limit (`RLIMIT_FSIZE`), which is the error of
write(2) that a full disk is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import contextlib, io, json, resource, sys
from pathlib import Path
import peft, torch
import hf_polyattn as hp
from hf_polyattn import cli
from hf_polyattn.errors import SaveError
from hf_polyattn.hub.adapters import save_polynomials
from transformers import AutoModelForCausalLM, AutoTokenizer

source, data, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
small = str(folder / "small")
AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=1).save_pretrained(small)
AutoTokenizer.from_pretrained(source).save_pretrained(small)
model = hp.patch_model(AutoModelForCausalLM.from_pretrained(small), "poly3")
report = hp.diagnose(model, [{"input_ids": torch.randint(3, 512, (2, 8))}], progress=False)
model.save_pretrained(folder / "polynomial")
lora = peft.LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
adapted = peft.get_peft_model(hp.patch_model(AutoModelForCausalLM.from_pretrained(small), "poly3"), lora)

def command(*words):
    sys.argv = ["polyattn", *words]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
        except SystemExit as ended:
            if ended.code:
                raise

CASES = {
    "model": (100_000, lambda place: command(
        "patch", small, str(place), "--data", data, "--batches", "1", "--spec", "poly3^16-l1")),
    "numbers.json": (100, lambda place: command("polynomials", str(folder / "polynomial"), "--json", str(place))),
    "polyattn.safetensors": (1_000, lambda place: save_polynomials(adapted, place.parent)),
    "state.pt": (10_000, lambda place: hp.distill(
        model, [{"input_ids": torch.randint(3, 512, (2, 8))}], steps=2, checkpoint=place, checkpoint_every=1,
        progress=False)),
    "figure.png": (1_000, lambda place: report.plot(place)),
    "modeling_polyattn.py": (1_000, lambda place: hp.export_remote_code(folder / "polynomial")),
    "kernel": (1_000, lambda place: hp.export_kernel(place)),
}
told = {}
for name, (limit, write) in CASES.items():
    place = (folder / "polynomial" if name.startswith("modeling") else folder / f"of {name}") / name
    place.parent.mkdir(exist_ok=True)
    if "." in name and name != "state.pt":  # from which a training would go on
        place.write_text("as it was")
    before = {str(path): path.read_bytes() for path in place.parent.rglob("*") if path.is_file()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write(place)
        error = None
    except (SaveError, SystemExit) as raised:
        error = str(raised)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    after = {str(path): path.read_bytes() for path in place.parent.rglob("*") if path.is_file()}
    told[name] = {"error": error, "same": before == after}
    write(place)  # now there is room
    done = name == "state.pt"  # which a training removes at its end
    told[name]["written"] = done or place.exists() and (place.is_dir() or place.read_bytes() != b"as it was")
print(json.dumps(told))
"""
NAMES = ("model", "numbers.json", "polyattn.safetensors", "state.pt", "figure.png", "modeling_polyattn.py", "kernel")


@pytest.fixture(scope="module")
def told(
    checkpoint: Callable[[str], Path], shared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What each writer said of a full disk, if its folder is as before, and if it writes where there is room."""
    paths = checkpoint("llama"), shared("datasets/tinystories"), tmp_path_factory.mktemp("disk")
    words = [sys.executable, "-W", "ignore", "-c", SCRIPT, *map(str, paths)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {*NAMES}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_leaves_what_was_there(name: str, told: dict[str, Any]) -> None:
    assert f"{name} cannot be written: " in told[name]["error"]
    assert told[name]["error"].endswith("What was there before is kept; make room and try again.")
    assert told[name]["same"]
    assert told[name]["written"]
