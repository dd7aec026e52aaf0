"""Polynomials under FSDP: float32 in a bfloat16 model, where a group of sharded parameters must have one dtype."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import nn


def install_on_fsdp(fsdp: Any) -> None:
    """Makes FSDP shard polynomials apart from the rest of a module, if their dtype is another.

    `fully_shard` does so under a `mp_policy` that casts, too: polynomials stay float32.
    """
    _install_on_fully_shard(fsdp)
    _install_on_wrapper(fsdp.FullyShardedDataParallel)


def _install_on_fully_shard(fsdp: Any) -> None:
    fully_shard = fsdp.fully_shard

    @wraps(fully_shard)
    def fully_shard_with_polyattn(module: Any, *args: Any, **kwargs: Any) -> Any:
        policy = kwargs.get("mp_policy") or fsdp.MixedPrecisionPolicy()
        ignored = kwargs.get("ignored_params") or set()
        for root in module if isinstance(module, list) else [module]:
            for child in _apart(root, casts=policy.param_dtype is not None):
                if fully_shard.state(child) is None and ignored.isdisjoint(child.parameters()):
                    own = replace(policy, param_dtype=None, output_dtype=None, cast_forward_inputs=False)
                    fully_shard(child, *args, **{**kwargs, "mp_policy": own})
        return fully_shard(module, *args, **kwargs)

    fsdp.fully_shard = fully_shard_with_polyattn


def _install_on_wrapper(wrapper_class: Any) -> None:
    """Adds polynomials to what the `auto_wrap_policy` of FullyShardedDataParallel wraps."""
    initialize = wrapper_class.__init__
    signature = inspect.signature(initialize)

    @wraps(initialize)
    def initialize_with_polyattn(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        module, policy = given.arguments["module"], given.arguments.get("auto_wrap_policy")
        wrapped = {part.module for part in module.modules() if isinstance(part, wrapper_class)}
        apart = set(_apart(module)) - wrapped
        if apart and (policy is None or callable(policy)):
            given.arguments["auto_wrap_policy"] = _wrapping(apart, policy)
        initialize(*given.args, **given.kwargs)

    wrapper_class.__init__ = initialize_with_polyattn


def _wrapping(apart: set[nn.Module], policy: Callable[..., bool] | None) -> Callable[..., bool]:
    def wrap(module: nn.Module, recurse: bool, nonwrapped_numel: int, **kwargs: Any) -> bool:
        if recurse or module in apart:
            return True
        return policy is not None and policy(module, recurse=False, nonwrapped_numel=nonwrapped_numel, **kwargs)

    return wrap


def _apart(root: nn.Module, *, casts: bool = False) -> list[nn.Module]:
    """Returns the polynomials inside of a module that need a group of their own; all of them, if others are cast."""
    from .core import PolyAttention  # this hook may run while `ops` imports torch

    inside = [module for module in root.modules() if isinstance(module, PolyAttention) and module is not root]
    own = {parameter for child in inside for parameter in child.parameters()}
    others = {p.dtype for p in root.parameters() if p not in own and p.requires_grad}
    if casts:
        return [*inside]
    return [child for child in inside if {p.dtype for p in child.parameters() if p.requires_grad} - others]
