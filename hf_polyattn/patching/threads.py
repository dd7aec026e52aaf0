"""Threads that share a patched model: what one of them makes of it for a while must not reach the others in silence.

Observers are per thread (`PolyAttention.observer`). Softmax for a while, and polynomials half written, are of the model
itself: other threads that run it meanwhile are refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PatchError
from .core import CHILD_NAME

_LOCK = threading.Lock()
_OWNERS: WeakKeyDictionary[nn.Module, tuple[int, str]] = WeakKeyDictionary()


@contextmanager
def alone(root: PreTrainedModel, doing: str) -> Iterator[None]:
    """Within, only this thread may run the patched attention of a model, or change what it is.

    Args:
        root: patched.
        doing: what goes on, for the errors of other threads.

    Raises:
        PatchError: another thread is doing such a thing to the model. In other threads: whenever they run it.
    """
    me, owned = threading.get_ident(), [module for module in root.modules() if CHILD_NAME in module._modules]
    with _LOCK:
        before = [_OWNERS.get(module) for module in owned]
        for owner in before:
            if owner is not None and owner[0] != me:
                raise PatchError(_refusal(root, owner[1]))
        _OWNERS.update(dict.fromkeys(owned, (me, doing)))
    # Models too: they make the masks.
    watched = [m for m in root.modules() if CHILD_NAME in m._modules or isinstance(m, PreTrainedModel)]
    guard = _Guard(root, me, doing)
    handles = [module.register_forward_pre_hook(guard) for module in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        with _LOCK:
            for module, owner in zip(owned, before, strict=True):
                if owner is None:
                    _OWNERS.pop(module, None)
                else:
                    _OWNERS[module] = owner


def is_doing(root: PreTrainedModel, doing: str) -> bool:
    """Whether this thread has a model in `alone` for such a thing."""
    me = threading.get_ident()
    return any(_OWNERS.get(module) == (me, doing) for module in root.modules() if CHILD_NAME in module._modules)


class _Guard:
    """A forward hook that refuses every thread but one."""

    def __init__(self, root: nn.Module, thread: int, doing: str) -> None:
        self.root, self.thread, self.doing = root, thread, doing

    def __reduce__(self) -> tuple[Any, ...]:
        return _Nobody, ()  # a copy of the model is another model

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        if torch.compiler.is_compiling() or threading.get_ident() == self.thread or is_helper(module):
            return
        raise PatchError(_refusal(self.root, self.doing))


class _Nobody:
    """The guard of a copied model."""

    def __call__(self, module: nn.Module, arguments: Any) -> None:
        """Refuses nobody."""


def is_helper(module: nn.Module) -> bool:
    """Whether a thread works for another one: autograd's, and those of DataParallel, which run replicas."""
    return torch._C._current_graph_task_id() != -1 or getattr(module, "_is_replica", False)


def _refusal(root: nn.Module, doing: str) -> str:
    return (
        f"another thread has this {type(root).__name__} in {doing}, in which its attention is not what it was. Wait "
        "until that has ended, do both in one thread, or give each thread a model of its own (copy.deepcopy)."
    )
