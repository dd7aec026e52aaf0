"""Importing the package is cheap, works in any order, and its modules import downwards only."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest
from import_blocker import without

import hf_polyattn as hp
from hf_polyattn.ops import BACKENDS

PACKAGE = Path(hp.__file__).parent
FILES = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}


def python(code: str, *arguments: str) -> str:
    """Returns what a new interpreter prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- import time

WITHOUT_TRITON = f"""
{without("triton")}
import time

try:
    import triton
except ImportError as error:
    assert "blocked" in str(error)
else:
    raise AssertionError("triton is not blocked")
"""
IMPORT = """
import transformers
before, start = set(sys.modules), time.perf_counter()
import hf_polyattn
print(time.perf_counter() - start)
heavy = {f"transformers.{name}" for name in ("modeling_utils", "trainer", "trainer_callback")}
heavy |= {"torch", "triton", "numpy"}
print(*sorted(heavy & (set(sys.modules) - before)))
"""
USE = """
import hf_polyattn, torch, transformers
assert "polyattn" in transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()
q = torch.randn(1, 2, 5, 8)
print(*hf_polyattn.polynomial_attention(q, q, q, torch.tensor([[0.0, 0.0, 0.0, 1.0]])).shape)
"""


def test_import_adds_nothing_heavy_to_transformers_and_takes_no_time() -> None:
    runs = [python(WITHOUT_TRITON + IMPORT).splitlines() for _ in range(3)]
    assert {heavy for _, heavy in runs} == {""}
    assert min(float(seconds) for seconds, _ in runs) < 0.3


def test_the_operator_works_without_triton() -> None:
    assert python(WITHOUT_TRITON + USE).split() == ["1", "5", "2", "8"]


# ---------------------------------------------------------------- any order

# Each module in a process where it is the first of the package, and where no model is imported yet.
FIRST = """
import importlib, os, sys, traceback
import torch
import transformers.integrations.sdpa_attention, transformers.masking_utils

assert "transformers.modeling_utils" not in sys.modules
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(f"hf_polyattn.{name}")
            import hf_polyattn, transformers
            assert "polyattn" in transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()
            assert hasattr(transformers.PreTrainedModel.post_init, "__wrapped__")
            assert not hasattr(transformers.PreTrainedModel.post_init.__wrapped__, "__wrapped__")
            assert callable(hf_polyattn.patch_model)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        print(name)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_every_module_can_be_imported_first() -> None:
    modules = sorted(name for name in FILES if floor_of(name) >= 3 and name != "__init__")
    assert {"attention", "hub", "patch"} <= set(modules)
    assert python(FIRST, *modules) == ""


HOOKED = """
import inspect, importlib
import hf_polyattn, transformers
from transformers import modeling_utils, trainer
hf_polyattn._activation.activate()
importlib.reload(hf_polyattn)
assert not hasattr(modeling_utils.PreTrainedModel.post_init.__wrapped__, "__wrapped__")
assert not hasattr(trainer.Trainer.get_decay_parameter_names.__wrapped__, "__wrapped__")
assert not hasattr(trainer.Trainer.log.__wrapped__, "__wrapped__")
assert "class PreTrainedModel" in inspect.getsource(modeling_utils)
assert "class Trainer" in inspect.getsource(trainer)
"""


def test_hooks_are_installed_once_and_modules_keep_their_source() -> None:
    python(HOOKED)


# ---------------------------------------------------------------- public names


def test_public_names_resolve_to_functions_and_classes() -> None:
    for name in FILES:  # a module of the same name must not take the place of a function
        if floor_of(name) != 1 and name != "__init__":
            importlib.import_module(f"hf_polyattn.{name}")
    for name in hp.__all__:
        value = getattr(hp, name)
        assert callable(value), name
        assert not isinstance(value, ModuleType), name
        assert value.__doc__, name
    assert set(hp.__all__) <= set(dir(hp))
    assert list(hp.__all__) == sorted(hp.__all__)
    with pytest.raises(AttributeError, match="'hf_polyattn' has no attribute 'softmax'"):
        hp.softmax  # noqa: B018


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name for block in blocks for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == set(hp.__all__)


# ---------------------------------------------------------------- floors

FLOORS = {
    0: {"errors", "files", "saved_config", "spec"},
    1: {"ops"},
    2: {"core"},
    3: {"attention", "families", "masking", "patch"},
    4: {"capture", "card_template", "checkpoint", "fitting", "inspection", "training"},
    5: {
        "bench", "calibration", "cards", "diagnosis", "examples", "hub_kernel", "layerwise", "modeling_polyattn",
        "monitor", "quality", "remote_code",
    },
    6: {"distillation", "pushing"},
    7: {"alignment", "annealing", "conversion", "hub"},
    8: {"_activation", "callback", "cli"},
    9: {"__init__", "__main__"},
}  # fmt: skip
SHARING_A_FLOOR = {0, 1, 3}  # where modules may import their neighbours
ALLOWED_PACKAGES = {
    0: set[str](),
    1: {"torch"},
    2: {"torch"},
    3: {"torch", "transformers"},
    4: {"torch", "transformers", "tqdm", "numpy", "huggingface_hub"},
    **{floor: {"torch", "transformers", "tqdm", "numpy", "safetensors", "huggingface_hub"} for floor in (5, 6, 7)},
    8: {"torch", "transformers", "typer"},
    9: set[str](),
}


def floor_of(module: str) -> int:
    floors = [floor for floor, modules in FLOORS.items() if module.partition(".")[0] in modules]
    assert floors, f"hf_polyattn/{module.replace('.', '/')}.py has no floor; DESIGN.md and this table name them"
    return floors[0]


def imports(module: str, everywhere: bool = True) -> Iterator[str]:
    """Yields what a module imports: names of the package's modules with a leading dot, other packages without.

    Leaves out imports for type checkers; `everywhere` includes the imports inside functions.
    """
    tree = ast.parse(FILES[module].read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree) if everywhere else tree.body:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level]
            target = [*package, *(node.module or "").split(".")] if node.module else package
            inside = [".".join([*target, alias.name]) for alias in node.names]
            yield from (f".{name if name in FILES else '.'.join(target)}" for name in inside)


def imported_modules(module: str) -> set[str]:
    return {name[1:] for name in imports(module) if name.startswith(".")}


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_imports_from_lower_floors_only(module: str) -> None:
    floor = floor_of(module)
    for imported in imported_modules(module):
        below = floor_of(imported)
        assert below < floor or (below == floor and floor in SHARING_A_FLOOR), f"{module} imports {imported}"


def test_the_reader_of_imports_sees_them() -> None:
    assert {"attention", "core", "families", "ops.backends", "spec"} <= imported_modules("patch")
    assert {"errors", "spec", "ops.call", "ops.reference"} <= imported_modules("ops.api")
    assert "patch" in imported_modules("hub")  # inside a function
    assert "torch" in set(imports("core", everywhere=False))


def test_imports_have_no_cycle() -> None:
    graph = {module: {f for f in imported_modules(module) if f in FILES} for module in FILES}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", sorted(FILES))
def test_optional_packages_are_imported_where_they_are_used(module: str) -> None:
    outside = {name for name in imports(module, everywhere=False) if not name.startswith(".")}
    allowed = ALLOWED_PACKAGES[floor_of(module)] | ({"triton"} if module.startswith("ops.triton_") else set())
    assert outside - sys.stdlib_module_names <= allowed


def test_backends_do_not_import_one_another_and_ops_knows_no_transformers() -> None:
    backends = {f"ops.{backend.module}" for backend in BACKENDS.values()}
    assert backends <= set(FILES)
    for backend in backends:
        assert not imported_modules(backend) & backends
    for module in FILES:
        if floor_of(module) <= 2:
            assert "transformers" not in set(imports(module))
