"""The backend table: who can run a call, and why not."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from ..errors import BackendError


@dataclass(frozen=True, slots=True)
class Problem:
    """One call of the operator without its tensors: all that a backend needs to accept or refuse it."""

    device: str
    dtype: torch.dtype
    normalizer: str
    power: int
    return_weights: bool
    radius_grad: bool


@dataclass(frozen=True, slots=True)
class Backend:
    """One row of the table.

    Attributes:
        module: the file in `hf_polyattn.ops`, imported when first chosen.
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def _cpu_is_usable() -> bool:
    from . import build

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
    return None


# `auto` takes the first that has no objection.
BACKENDS: dict[str, Backend] = {
    "cpu": Backend("cpu", fused=True, why_not=_cpu_why_not, usable=_cpu_is_usable),
    "chunked": Backend("chunked", fused=True, why_not=_chunked_why_not),
    "reference": Backend("reference", fused=False, why_not=_reference_why_not),
}


def check_name(name: str) -> None:
    """Raises BackendError if no backend is called `name`."""
    if name != "auto" and name not in BACKENDS:
        raise BackendError(f"backend {name!r} does not exist. Use one of {['auto', *BACKENDS]}.")


def select(name: str, problem: Problem) -> str:
    """Returns the name of the backend that runs `problem`.

    Raises:
        BackendError: `name` does not exist, or cannot run the problem; it never falls back.
    """
    check_name(name)
    if name == "auto":
        return next(name for name, row in BACKENDS.items() if row.why_not(problem) is None and row.usable())
    reason = BACKENDS[name].why_not(problem)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run this call: {reason}. Use backend='reference' or 'auto'.")
    return name
