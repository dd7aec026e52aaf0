"""Builds the C++ kernels of `csrc/` with the machine's compiler, once, and loads them.

The library lands in the user's cache under a name that hashes the sources, PyTorch's version, the compiler and its
flags. Several processes may build at once: the first takes a lock, which the system frees if it dies, and the others
wait for its library; it is written beside and renamed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from ...errors import BackendError
from ..cache import user_cache

_SOURCES = Path(__file__).parent / "csrc"

# What ATen's vector types need to be compiled for a machine, by what PyTorch runs on it.
_CAPABILITY_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


class BuildError(BackendError):
    """The kernels cannot be compiled or loaded here; the message holds the compiler's."""


def cache_folder() -> Path:
    """Returns where built kernels are kept: $POLYATTN_CACHE, or `user_cache`."""
    return Path(os.environ.get("POLYATTN_CACHE") or user_cache())


def compiler() -> str | None:
    """Returns the path of the C++ compiler ($CXX, or the machine's), None if there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def flags() -> list[str]:
    """Returns the compiler's flags for this machine and this PyTorch."""
    from torch.utils import cpp_extension

    capability = torch.backends.cpu.get_cpu_capability()
    machine = list(_CAPABILITY_FLAGS.get(capability, []))
    if machine:
        machine += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    else:
        machine += ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]
    if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        machine.append("-mavx512bf16")
    return [
        "-std=c++20",
        "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        "-fopenmp",
        "-fno-math-errno",
        "-fno-trapping-math",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *machine,
        *(f"-I{path}" for path in cpp_extension.include_paths("cpu")),
    ]


def libraries() -> list[str]:
    """Returns the linker's flags: PyTorch's libraries, and through them the OpenMP runtime that PyTorch runs on.

    A second OpenMP runtime in the process would have threads of its own, which wait on the same cores.
    """
    from torch.utils import cpp_extension

    return [*(f"-L{path}" for path in cpp_extension.library_paths("cpu")), "-ltorch", "-ltorch_cpu", "-lc10"]


def library_path() -> Path:
    """Returns the path of the built library, whether it exists or not.

    Raises:
        BuildError: there is no compiler.
    """
    path = compiler()
    if path is None:
        raise BuildError(
            "the CPU kernels need a C++ compiler, and none was found. Install g++ or clang++, or set $CXX; "
            "backend='chunked' needs none."
        )
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [version, torch.__version__, platform.machine(), *flags(), *libraries()]
    parts += [file.read_text() for file in sorted(_SOURCES.iterdir())]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_folder() / f"polyattn_cpu-{digest}.so"


def build() -> Path:
    """Compiles the kernels if they are not built yet; returns the library's path.

    Raises:
        BuildError: there is no compiler, it fails, files cannot be locked, or the cache cannot be written.
    """
    try:
        library = library_path()
        if not _is_whole(library):
            library.parent.mkdir(parents=True, exist_ok=True)
            with _locked(library.with_suffix(".lock")):
                if not _is_whole(library):
                    _compile(library)
    except OSError as error:
        raise BuildError(
            f"the CPU kernels cannot be written to {error.filename or 'the cache'}: {error}. "
            "Set $POLYATTN_CACHE to a folder that can."
        ) from error
    return library


def _is_whole(library: Path) -> bool:
    """Whether a library is there as it was built: the loader dies of one that is cut short."""
    try:
        return _digest_file(library).read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except FileNotFoundError:
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _compile(library: Path) -> None:
    started = time.perf_counter()
    print(f"hf_polyattn: compiling the CPU kernels, once, into {library.parent} …", end="", file=sys.stderr, flush=True)
    folder = library.with_suffix(".partial")  # nobody else's, under the lock
    shutil.rmtree(folder, ignore_errors=True)  # of a builder that was killed
    folder.mkdir()
    try:
        parts = {source: str(folder / f"{source.stem}.o") for source in sorted(_SOURCES.glob("*.cpp"))}
        compiling = [[str(compiler()), *flags(), "-c", str(source), "-o", part] for source, part in parts.items()]
        linked = folder / library.name
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, compiling))
        _run([str(compiler()), "-shared", *parts.values(), "-o", str(linked), *libraries()])
        digest = folder / "digest"
        digest.write_text(hashlib.sha256(linked.read_bytes()).hexdigest())
        os.replace(linked, library)
        os.replace(digest, _digest_file(library))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f" {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        print(" failed", file=sys.stderr)
        raise BuildError(f"the CPU kernels do not compile: {' '.join(command)}\n{result.stderr[-4000:]}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise BuildError(
            f"the CPU kernels are built under a file lock (fcntl), which {platform.system()} does not have; "
            "backend='chunked' needs no build."
        ) from error
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def load() -> None:
    """Builds the kernels if they are not built yet, and loads them: `torch.ops.polyattn_cpu`.

    Raises:
        BuildError: as `build`, or the library cannot be loaded.
    """
    library = build()
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise BuildError(
            f"the built CPU kernels cannot be loaded: {error}. Delete {library} to build again."
        ) from error
