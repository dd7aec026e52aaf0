"""The operator as a kernel of the Hub: the layout that Hugging Face's `kernels` library loads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from ..errors import InputError
from ..files import written_beside

NAME = "hf_polyattn_kernel"
VERSION = 1
_LICENSE = "Apache-2.0"
_BACKENDS = ("cpu", "cuda")
_PACKAGE = Path(__file__).parents[1]
# C++ that is compiled on the user's machine, and the measurements behind the tuning tables, are not in a kernel.
_LEFT_OUT = shutil.ignore_patterns("cpu", "tune.py", "__pycache__")

_INIT = '''"""Polynomial attention: the operator of hf_polyattn, by Triton on NVIDIA GPUs and by PyTorch elsewhere."""

from .ops import BACKENDS, packed_ranges, polynomial_attention, score_moments

BACKENDS.pop("cpu", None)  # C++, not in a universal build; pip install hf_polyattn has it

__all__ = ["BACKENDS", "packed_ranges", "polynomial_attention", "score_moments"]
'''
_README = f"""---
library_name: kernels
license: {_LICENSE.lower()}
---

# {NAME}

Polynomial attention, forward and backward: Triton on NVIDIA GPUs from compute capability 8.0 on, PyTorch elsewhere.

```python
from kernels import get_kernel

kernel = get_kernel("<user>/{NAME.replace("_", "-")}", version={VERSION}, trust_remote_code=True)
out = kernel.polynomial_attention(query, key, value, coefficients, causal=True, normalizer="l1")
```

Made by `hf_polyattn.hub.kernel.export_kernel`. The package `hf_polyattn` patches and calibrates whole models.
"""


def export_kernel(folder: str | os.PathLike[str]) -> Path:
    """Writes the operator as a repository of a Hub kernel: sources for kernel-builder, and builds ready to load.

    The builds, `torch-cpu` and `torch-cuda`, are the same Python files: the Triton kernels, the PyTorch backends and
    the tuning tables of this package, copied. `kernels.get_local_kernel(folder)` loads them.

    Args:
        folder: replaced if it holds an exported kernel.

    Returns:
        The folder.

    Raises:
        InputError: the folder holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / "build.toml").exists() or not any(folder.iterdir()))):
        raise InputError(f"{folder} exists and holds no kernel; name a new folder, or remove it first")
    with written_beside(folder) as partial:
        source = partial / "torch-ext" / NAME
        _copy_package(source)
        backends = ", ".join(f'"{backend}"' for backend in _BACKENDS)
        (partial / "build.toml").write_text(
            f'[general]\nedition = 5\nname = "{NAME.replace("_", "-")}"\nversion = {VERSION}\n'
            f'license = "{_LICENSE}"\nbackends = [{backends}]\n\n[torch-noarch]\n'
        )
        (partial / "README.md").write_text(_README, encoding="utf-8")
        digest = _digest(source)
        for backend in _BACKENDS:
            build = partial / "build" / f"torch-{backend}"
            shutil.copytree(source, build)
            metadata = {
                "id": f"_{NAME}_{backend}_{digest}",  # its name in sys.modules, and the namespace of its operators
                "name": NAME.replace("_", "-"),
                "version": VERSION,
                "license": _LICENSE,
                "python-depends": [],
                "backend": {"type": backend},
            }
            (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return folder


def _copy_package(target: Path) -> None:
    """Copies the operator and what it imports, with the same relative imports."""
    shutil.copytree(_PACKAGE / "ops", target / "ops", ignore=_LEFT_OUT)
    (target / "__init__.py").write_text(_INIT, encoding="utf-8")
    for name in ("errors.py", "spec.py"):
        shutil.copyfile(_PACKAGE / name, target / name)


def _digest(folder: Path) -> str:
    content = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return content.hexdigest()[:12]
