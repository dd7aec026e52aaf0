"""The backend table: who can run a call, and why not."""

from __future__ import annotations

import importlib
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
    """

    module: str
    fused: bool
    why_not: Callable[[Problem], str | None]

    def load(self) -> ModuleType:
        """Returns the imported module of the backend."""
        return importlib.import_module(f"{__package__}.{self.module}")


def _reference_why_not(problem: Problem) -> str | None:
    return None


def _chunked_why_not(problem: Problem) -> str | None:
    if problem.return_weights:
        return "it never forms the whole attention weights (return_weights=True)"
    if problem.radius_grad:
        return "it has no gradient for the radius"
    return None


# `auto` takes the first that has no objection.
BACKENDS: dict[str, Backend] = {
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
        return next(candidate for candidate, backend in BACKENDS.items() if backend.why_not(problem) is None)
    reason = BACKENDS[name].why_not(problem)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run this call: {reason}. Use backend='reference' or 'auto'.")
    return name
