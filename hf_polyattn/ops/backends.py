"""The backend table: who can run a call, and why not."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import torch

from ..errors import BackendError

Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """Has a compiler ask a function while it traces, as `torch.compiler.assume_constant_result` does.

    That imports the compiler, which takes longer than all the rest of torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True, slots=True)
class Problem:
    """One call of the operator without its tensors: all that a backend needs to accept or refuse it.

    `transform` names what differentiates it, other than autograd's backward pass.
    """

    device: str
    dtype: torch.dtype
    normalizer: str
    power: int
    return_weights: bool
    radius_grad: bool
    head_dim: int
    value_dim: int
    transform: str | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """One row of the table.

    Attributes:
        module: in `hf_polyattn.ops`, imported when first chosen.
        fused: whether it runs behind the `torch.library` operator with a backward of its own; otherwise it
            is plain PyTorch that autograd and the compiler see through.
        why_not: the reason why it cannot run a problem, or None.
        usable: whether this machine has what it needs; `auto` asks, after `why_not`, and warns once where not.
    """

    module: str
    fused: bool
    why_not: Callable[[Problem], str | None]
    usable: Callable[[], bool] = lambda: True

    def load(self) -> ModuleType:
        """Returns the imported module of the backend."""
        return importlib.import_module(f"{__package__}.{self.module}")


def _reference_why_not(problem: Problem) -> str | None:
    return None


def _cpu_why_not(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"it runs on CPUs, not on {problem.device}"
    if problem.dtype == torch.float64:
        return "it computes in float32, and the inputs are float64"
    return _chunked_why_not(problem)


@constant
def _cpu_is_usable() -> bool:
    return _cpu_kernels_load()


@functools.cache
def _cpu_kernels_load() -> bool:
    from .cpu import build

    try:
        build.load()
    except BackendError as error:
        warnings.warn(f"{error}\nhf_polyattn runs attention by PyTorch instead, some times slower.", stacklevel=2)
        return False
    return True


def _chunked_why_not(problem: Problem) -> str | None:
    if problem.return_weights:
        return "it never forms the whole attention weights (return_weights=True)"
    if problem.radius_grad:
        return "it has no gradient for the radius"
    if problem.transform is not None:
        return f"it has derivatives for autograd's backward pass only, and runs under {problem.transform}"
    return None


# Set before Triton is imported, it runs kernels on the CPU, slowly: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _triton_why_not(problem: Problem) -> str | None:
    if problem.device != ("cpu" if INTERPRETED else "cuda"):
        return f"it needs a CUDA device, or TRITON_INTERPRET=1 on the CPU; device {problem.device}"
    if problem.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {str(problem.dtype).removeprefix('torch.')}"
    if INTERPRETED and problem.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly"
    if max(problem.head_dim, problem.value_dim) > 256:
        return f"head dims above 256: {problem.head_dim} and {problem.value_dim}"
    return _chunked_why_not(problem) or _triton_missing()


@constant
def _triton_missing() -> str | None:
    """Returns why Triton cannot run on this machine, or None."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "it needs the package triton: pip install triton"
    if INTERPRETED:
        return None
    if torch.version.cuda is None:
        return "it was only built for NVIDIA devices"
    capability = torch.cuda.get_device_capability()
    return None if capability >= (8, 0) else f"it needs compute capability 8.0, the device has {capability}"


# `auto` takes the first that has no objection.
BACKENDS: dict[str, Backend] = {
    "triton": Backend("triton.launch", fused=True, why_not=_triton_why_not),
    "cpu": Backend("cpu.launch", fused=True, why_not=_cpu_why_not, usable=_cpu_is_usable),
    "chunked": Backend("chunked", fused=True, why_not=_chunked_why_not),
    "reference": Backend("reference", fused=False, why_not=_reference_why_not),
}


def check_name(name: str) -> None:
    """Raises BackendError if no backend is called `name`."""
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"backend {name!r} does not exist. Use one of {['auto', *BACKENDS]}.")


def is_traced() -> bool:
    """Whether `torch.jit.trace` records what runs."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined,no-any-return,no-untyped-call]


def select(name: str, problem: Problem) -> str:
    """Returns the name of the backend that runs `problem`.

    An export or a trace is run by nobody here: `auto` is `reference` then, plain ATen that needs no package to read; to
    ONNX every backend is, for it knows no operators of ours.

    Raises:
        BackendError: `name` does not exist, or cannot run the problem; it never falls back.
    """
    check_name(name)
    if torch.onnx.is_in_onnx_export() or (name == "auto" and (torch.compiler.is_exporting() or is_traced())):
        return "reference"
    if name == "auto":
        return next(name for name, row in BACKENDS.items() if row.why_not(problem) is None and row.usable())
    reason = BACKENDS[name].why_not(problem)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run this call: {reason}. Use backend='reference' or 'auto'.")
    return name
