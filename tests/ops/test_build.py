"""The C++ kernels are compiled once and loaded whole, or it is said why not, and attention runs all the same."""

from __future__ import annotations

import os
import pwd
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from error_budget import operands

from hf_polyattn import BackendError, polynomial_attention
from hf_polyattn.ops import backends
from hf_polyattn.ops.cache import user_cache
from hf_polyattn.ops.cpu import build


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A source that compiles at once in place of the kernels, an empty cache, and a compiler that logs its calls."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "attention.cpp").write_text('extern "C" int polyattn() { return 7; }')
    wrapper = tmp_path / "logging-compiler"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec {build.compiler()} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("POLYATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setattr(build, "_SOURCES", folder)
    return folder


def compiled(sources: Path) -> int:
    calls = sources.parent / "calls"
    return sum(" -c " in line for line in calls.read_text().splitlines()) if calls.exists() else 0


def test_a_library_is_built_once_for_its_source(sources: Path, capsys: Any) -> None:
    first = build.build()
    assert capsys.readouterr().err.startswith("hf_polyattn: compiling the CPU kernels, once, into ")
    assert build.build() == first
    assert capsys.readouterr().err == ""
    assert compiled(sources) == 1
    (sources / "attention.cpp").write_text('extern "C" int polyattn() { return 8; }')
    assert build.build() != first
    assert compiled(sources) == 2
    assert sorted(path.suffix for path in first.parent.iterdir()) == [*[".lock"] * 2, *[".sha256"] * 2, *[".so"] * 2]


def test_two_processes_build_one_library(sources: Path) -> None:
    code = (
        "import pathlib, sys; from hf_polyattn.ops.cpu import build; build._SOURCES = pathlib.Path(sys.argv[1]); "
        "print(build.build())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(sources)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(paths) == 1
    assert Path(paths.pop()).is_file()
    assert compiled(sources) == 1


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(sources: Path, capsys: Any) -> None:
    (sources / "attention.cpp").write_text("this is no C++")
    with pytest.raises(build.BuildError, match=r"do not compile: .*logging-compiler(.|\n)*error(.|\n)*this is no C"):
        build.build()
    assert [path.suffix for path in build.cache_folder().iterdir()] == [".lock"]
    assert capsys.readouterr().err.endswith(" failed\n")


def test_a_full_disk_is_quoted_and_leaves_nothing(sources: Path, capsys: Any) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = " ".join(f"int f{number}() {{ return {number}; }}" for number in range(2000))
    (sources / "attention.cpp").write_text(room)  # more than the limit, compiled
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))
    try:
        with pytest.raises(build.BuildError, match=r"do not compile: .*logging-compiler(.|\n)*(File size|too large)"):
            build.build()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.suffix for path in build.cache_folder().iterdir()] == [".lock"]
    assert build.build().is_file()  # now there is room


def test_without_a_compiler_auto_warns_once_and_uses_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "compiler", lambda: None)
    uncached = backends._cpu_kernels_load.__wrapped__
    monkeypatch.setattr(build, "load", lambda: build.build())
    with pytest.warns(UserWarning, match=r"need a C\+\+ compiler, and none was found(.|\n)*runs attention by PyTorch"):
        assert not uncached()
    tensors = operands(dtype=torch.bfloat16)
    with pytest.raises(BackendError, match=r"need a C\+\+ compiler, and none was found. Install g\+\+ or clang\+\+"):
        polynomial_attention(*tensors, backend="cpu")


def test_a_system_without_file_locks_is_told_so(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with pytest.raises(
        build.BuildError, match=r"under a file lock \(fcntl\), which .* does not have; backend='chunked'"
    ):
        build.build()
    assert compiled(sources) == 0


def test_a_cache_that_cannot_be_written_is_named(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYATTN_CACHE", str(sources / "attention.cpp" / "inside-a-file"))
    with pytest.raises(build.BuildError, match=r"cannot be written to .*inside-a-file.*Set \$POLYATTN_CACHE"):
        build.build()


@pytest.mark.parametrize("damage", ["cut short", "another", "no digest"])
def test_a_damaged_library_is_built_again(sources: Path, damage: str) -> None:
    library = build.build()
    whole = library.read_bytes()
    if damage == "cut short":  # the loader would die of it, with SIGBUS
        library.write_bytes(whole[:4096])
    elif damage == "another":
        library.write_bytes(b"\0" * len(whole))
    else:
        library.with_suffix(".sha256").unlink()
    assert build.build() == library
    assert compiled(sources) == 2
    assert library.read_bytes()[:4] == b"\x7fELF"
    assert len(library.read_bytes()) == len(whole)
    build.build()
    assert compiled(sources) == 2


LOADING = """
import os, shutil, sys
import torch
from hf_polyattn import polynomial_attention
from hf_polyattn.ops.cpu import build

whole = build.build()
os.environ["POLYATTN_CACHE"] = sys.argv[1]
library = build.library_path()
os.makedirs(library.parent, exist_ok=True)
library.write_bytes(whole.read_bytes()[:200_000])
if sys.argv[2] == "verified":
    def copy(to):
        shutil.copy(whole, to)
        shutil.copy(whole.with_suffix(".sha256"), to.with_suffix(".sha256"))
    build._compile = copy
else:
    build._is_whole = lambda library: library.exists()
q = torch.ones(1, 1, 16, 4)
print(polynomial_attention(q, q, q, torch.tensor([[0.0, 0.0, 1.0]]), backend="cpu")[0, 0, 0, 0].item())
"""


def test_a_library_that_is_cut_short_is_not_loaded(tmp_path: Path) -> None:
    def run(way: str) -> Any:
        command = [sys.executable, "-c", LOADING, str(tmp_path / way), way]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("verified")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(4.0 * 16**0.5)
    assert run("unverified").returncode != 0  # killed, or refused by the loader


def test_what_a_killed_builder_left_is_removed(sources: Path) -> None:
    library = build.library_path()
    left = library.with_suffix(".partial")
    left.mkdir(parents=True)
    (left / "attention.o").write_bytes(b"half")
    assert build.build() == library
    assert not left.exists()
    assert library.is_file()


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process of a user without an entry in the list of users, and without $HOME; its temporary folder."""

    def unknown(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "POLYATTN_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_user_without_a_home_has_a_folder_nobody_else_can_write_to(homeless: Path) -> None:
    with pytest.raises(RuntimeError):
        Path.home()
    folder = homeless / f"hf_polyattn-{os.getuid()}"
    assert user_cache() == folder
    assert user_cache() == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert build.library_path().parent == folder


@pytest.mark.parametrize("planted", ["open", "link"])
def test_a_folder_that_others_can_write_to_is_refused(
    homeless: Path, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = homeless / f"hf_polyattn-{os.getuid()}"
    if planted == "link":
        (homeless / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(homeless / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(build.BuildError, match=r"not a folder that only this user can write to.*POLYATTN_CACHE"):
        build.build()
    monkeypatch.setattr(build, "load", lambda: build.build())
    with pytest.warns(UserWarning, match="runs attention by PyTorch instead"):
        assert not backends._cpu_kernels_load.__wrapped__()
