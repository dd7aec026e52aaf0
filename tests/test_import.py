"""Importing the package is cheap, works in any order, and its modules import downwards only."""

from __future__ import annotations

import ast
import importlib
import os
import re
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
    assert min(float(seconds) for seconds, _ in runs) < 0.1


def test_the_operator_imports_no_compiler() -> None:
    """The command line waits for it, and it takes longer than the rest of torch."""
    assert python("import sys, hf_polyattn.ops; print('torch._dynamo' in sys.modules)") == "False\n"


def test_the_operator_works_without_triton() -> None:
    assert python(WITHOUT_TRITON + USE).split() == ["1", "5", "2", "8"]


# ---------------------------------------------------------------- any order

# Each module in a process where it is the first of the package, and where no model is imported yet. What Transformers
# then imports from other packages, which takes most of the time, is imported once for all.
FIRST = """
import importlib, os, sys, traceback
import torch
import transformers.integrations.sdpa_attention, transformers.masking_utils

reading, writing = os.pipe()
if os.fork() == 0:
    import transformers.modeling_utils
    hooked = ("transformers", "peft", "sentence_transformers")
    others = [name for name in sys.modules if name.partition(".")[0] not in hooked and name != "__main__"]
    os.write(writing, " ".join(others).encode())
    os._exit(0)
os.close(writing)
with open(reading) as others:
    for name in others.read().split():
        try:
            importlib.import_module(name)
        except ImportError:  # of what has no file of that name, such as the parts of an extension
            pass
os.wait()

assert not {"hf_polyattn", "transformers.modeling_utils"} & set(sys.modules)
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
    above = list(HOUSE)[list(HOUSE).index("patching") :]
    modules = sorted(name for name in FILES if room_of(name) in above and name != "__init__")
    assert {"patching.attention", "hub.hooks", "patching.patch"} <= set(modules)
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
        if room_of(name) != "ops" and name != "__init__":
            importlib.import_module(f"hf_polyattn.{name}")
    for name in hp.__all__:
        value = getattr(hp, name)
        assert callable(value), name
        assert not isinstance(value, ModuleType), name
        assert value.__doc__, name
    assert set(hp.__all__) <= set(dir(hp))
    assert list(hp.__all__) == sorted(hp.__all__)
    assert all(isinstance(getattr(hp, room), ModuleType) for room in hp._ROOMS)
    with pytest.raises(AttributeError, match="'hf_polyattn' has no attribute 'softmax'"):
        hp.softmax  # noqa: B018


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name for block in blocks for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == {*hp.__all__, *hp._ROOMS}


# ---------------------------------------------------------------- rooms

# The table of rooms in DESIGN.md, section 3: a row a floor, `room` or `room/`, and the rooms that it imports.
ROW = re.compile(r"^\| (?P<rooms>`[^|]+) \|[^|]+\| (?P<imports>[^|]+) \|$", re.MULTILINE)


def read_house() -> dict[str, set[str]]:
    """Returns what each room of DESIGN.md's table may import, in the table's order."""
    text = (PACKAGE.parent / "DESIGN.md").read_text()
    section = text[text.index("## 3.") : text.index("## 4.")]
    names = re.compile(r"`([\w.]+)/?`")
    return {
        room: set(names.findall(row["imports"]))
        for row in ROW.finditer(section)
        for room in names.findall(row["rooms"])
    }


HOUSE = read_house()
NUMERIC = {"torch", "transformers", "tqdm", "numpy", "safetensors", "huggingface_hub"}
PACKAGES = {
    "ops": {"torch"},
    "patching": {"torch", "transformers"},
    "adaptation": NUMERIC,
    "diagnosis": NUMERIC,
    "hub": NUMERIC,
    "plot": NUMERIC,
    "explore": NUMERIC,
    "bench": NUMERIC,
    "examples": NUMERIC,
    "cli": {"typer"},
}


def room_of(module: str) -> str:
    return module.partition(".")[0]


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


def test_every_module_has_a_room_and_every_room_is_there() -> None:
    assert {room_of(module) for module in FILES} == HOUSE.keys()


@pytest.mark.parametrize("room", HOUSE)
def test_a_room_imports_what_design_md_says_and_nothing_from_above(room: str) -> None:
    imported = {room_of(name) for module in FILES if room_of(module) == room for name in imported_modules(module)}
    assert imported - {room} == HOUSE[room]
    order = list(HOUSE)
    assert all(order.index(other) < order.index(room) for other in HOUSE[room])


def test_the_reader_of_imports_sees_them() -> None:
    assert {"patching.core", "patching.families", "ops.backends", "spec"} <= imported_modules("patching.patch")
    assert {"spec", "ops.call", "ops.checks", "ops.reference"} <= imported_modules("ops.api")
    assert "patching.governing" in imported_modules("hub.hooks")  # inside a function
    assert "torch" in set(imports("patching.core", everywhere=False))


def test_imports_have_no_cycle() -> None:
    graph = {module: {f for f in imported_modules(module) if f in FILES} for module in FILES}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", sorted(FILES))
def test_optional_packages_are_imported_where_they_are_used(module: str) -> None:
    outside = {name for name in imports(module, everywhere=False) if not name.startswith(".")}
    allowed = PACKAGES.get(room_of(module), set()) | ({"triton"} if module.startswith("ops.triton.") else set())
    allowed |= {"gradio"} if module == "explore.page" else set()
    assert outside - sys.stdlib_module_names <= allowed


def test_backends_do_not_import_one_another_and_ops_knows_no_transformers() -> None:
    modules = {f"ops.{backend.module}" for backend in BACKENDS.values()}
    assert modules <= set(FILES)
    of_backend = {module: ".".join(module.split(".")[:2]) for module in FILES if module.startswith("ops.")}
    backends = {of_backend[module] for module in modules}
    for module, backend in of_backend.items():
        if backend in backends:
            others = {of_backend.get(name, name) for name in imported_modules(module)} & backends
            assert others <= {backend}, module
        assert "transformers" not in set(imports(module))


# ---------------------------------------------------------------- before there were rooms

OLD = """
import importlib, sys
import hf_polyattn
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"hf_polyattn.{name}")
    except ModuleNotFoundError as error:
        print(error)
"""


def test_a_module_of_version_0_1_0_is_refused_with_its_new_place() -> None:
    from hf_polyattn._activation import _MOVED

    printed = python(OLD, *_MOVED).splitlines()
    assert len(printed) == len(_MOVED)
    for name, line in zip(_MOVED, printed, strict=True):
        old, _, new = line.partition(";")[0].partition(" is now hf_polyattn.")
        assert old == f"hf_polyattn.{name}"
        assert {new, f"{new}.__init__"} & FILES.keys()
    room = importlib.import_module("hf_polyattn.diagnosis")  # a file that became a room
    assert room.diagnose is hp.diagnose
