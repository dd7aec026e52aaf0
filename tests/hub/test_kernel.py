"""The operator, exported as a kernel of the Hub, loads and computes without this package."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from import_blocker import without
from typer.testing import CliRunner

import hf_polyattn as hp
from hf_polyattn.cli import app
from hf_polyattn.hub.kernel import NAME, export_kernel

# Not in the environment of the other tests: where Transformers finds it, it may look for kernels of its own.
LIBRARY_FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "kernels-0.17.2"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_kernel(tmp_path_factory.mktemp("kernels") / "kernel")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of a call, and what it returns in float64 by the reference."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 33, 16, generator=generator) for heads in (4, 2, 2))
    coefficients = torch.randn(4, 5, generator=generator)
    wide = [tensor.double() for tensor in (query, key, value, coefficients)]
    options: dict[str, Any] = {"causal": True, "normalizer": "l1", "radius": 3.0, "clamp": True}
    expected = hp.polynomial_attention(*wide, backend="reference", **options)
    inputs = [query, key, value, coefficients]
    file = tmp_path_factory.mktemp("case") / "case.pt"
    torch.save({"inputs": inputs, "options": options, "expected": expected}, file)
    return file


# As `kernels` imports a build; and where the package is, too, both have operators of their own.
BEFORE = {"alone": without("hf_polyattn"), "beside-the-package": "import hf_polyattn.ops.library"}
RUN = """
import importlib.util, json, sys
from pathlib import Path
import torch

build, case = Path(sys.argv[1]), torch.load(sys.argv[2])
name = json.loads((build / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
for backend in sys.argv[3].split(","):
    inputs = [tensor.clone().requires_grad_() for tensor in case["inputs"]]
    output = kernel.polynomial_attention(*inputs, backend=backend, **case["options"])
    output.square().mean().backward()
    assert all(tensor.grad.isfinite().all() and tensor.grad.any() for tensor in inputs)
    difference = (output - case["expected"]).abs().max() / case["expected"].abs().max()
    print(float(difference), float(case["expected"].std() / case["expected"].abs().max()))
assert any(name.endswith("attention") for name in torch._C._dispatch_get_all_op_names() if "kernel" in name)
"""


def run(build: Path, case: Path, beside: str, backends: str, **environment: str) -> list[list[float]]:
    command = [sys.executable, "-c", BEFORE[beside] + RUN, str(build), str(case), backends]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return [[float(word) for word in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("beside", BEFORE)
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_build_computes_what_the_reference_does(backend: str, beside: str, kernel: Path, case: Path) -> None:
    results = run(kernel / "build" / f"torch-{backend}", case, beside, "auto,chunked,reference")
    assert len(results) == 3
    for difference, spread in results:
        assert difference < 1e-5 < spread


def test_the_triton_kernels_of_a_build_run(kernel: Path, case: Path) -> None:
    pytest.importorskip("triton")
    ((difference, _),) = run(kernel / "build" / "torch-cuda", case, "alone", "triton", TRITON_INTERPRET="1")
    assert difference < 1e-5


LIBRARY = """
import sys
from pathlib import Path

sys.path.append(sys.argv[3])
import torch
from kernels import get_local_kernel
from kernels._rust import Build

case = torch.load(sys.argv[2])
kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
output = kernel.polynomial_attention(*case["inputs"], **case["options"])
torch.testing.assert_close(output.double(), case["expected"], rtol=1e-4, atol=1e-5)
print(*kernel.BACKENDS, *Build.open(sys.argv[1]).general.backends)
"""


def test_the_kernels_library_loads_it(kernel: Path, case: Path) -> None:
    if not (LIBRARY_FOLDER / "kernels").is_dir():
        pytest.skip(f"needs .cache/{LIBRARY_FOLDER.name}: make setup")
    command = [sys.executable, "-c", LIBRARY, str(kernel), str(case), str(LIBRARY_FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.lower().split() == ["triton", "chunked", "reference", "cpu", "cuda"]


def test_the_sources_are_the_packages_own(kernel: Path) -> None:
    package = Path(hp.__file__).parent
    copies = [file for file in (kernel / "torch-ext" / NAME).rglob("*") if file.is_file()]
    assert len(copies) > 15
    for file in copies:
        relative = file.relative_to(kernel / "torch-ext" / NAME)
        if str(relative) != "__init__.py":
            assert file.read_bytes() == (package / relative).read_bytes()
        for backend in ("cpu", "cuda"):
            assert (kernel / "build" / f"torch-{backend}" / relative).read_bytes() == file.read_bytes()
        if file.suffix == ".py":  # kernels are imported from anywhere: nothing absolute but torch, triton and Python
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    assert str(node.module).partition(".")[0] in sys.stdlib_module_names | {"torch", "triton"}


def test_the_command_line_exports_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export-kernel", str(tmp_path / "kernel")])
    assert result.exit_code == 0
    assert "kernels.get_local_kernel loads it" in result.output
    assert (tmp_path / "kernel" / "build" / "torch-cuda" / "metadata.json").exists()


def test_builds_have_names_of_their_own(kernel: Path) -> None:
    builds = sorted((kernel / "build").iterdir())
    ids = [json.loads((build / "metadata.json").read_text())["id"] for build in builds]
    assert [build.name for build in builds] == ["torch-cpu", "torch-cuda"]
    assert len(set(ids)) == 2
    assert all(name.isidentifier() for name in ids)


def test_a_kernel_is_replaced_and_other_folders_are_not(kernel: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    assert export_kernel(tmp_path / "kernel") == tmp_path / "kernel"
    (tmp_path / "kernel" / "old").write_text("")
    export_kernel(tmp_path / "kernel")
    assert not (tmp_path / "kernel" / "old").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(hp.InputError, match="exists and holds no kernel"):
        export_kernel(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
