"""Polynomials under FSDP2: float32 in a bfloat16 model, which `fully_shard` takes in one group with nothing else."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import Any

from torch import nn

from .core import PolyAttention


def install_on_fsdp(fsdp: Any) -> None:
    """Makes `fully_shard` shard polynomials apart from the rest of a module, if their dtype is or would be another.

    They then keep float32 under a `mp_policy`, too.
    """
    fully_shard = fsdp.fully_shard

    @wraps(fully_shard)
    def fully_shard_with_polyattn(module: Any, *args: Any, **kwargs: Any) -> Any:
        policy = kwargs.get("mp_policy") or fsdp.MixedPrecisionPolicy()
        ignored = kwargs.get("ignored_params") or set()
        for root in module if isinstance(module, list) else [module]:
            for child in _apart(root, policy.param_dtype is not None, ignored):
                if fully_shard.state(child) is None:
                    own = replace(policy, param_dtype=None, output_dtype=None, cast_forward_inputs=False)
                    fully_shard(child, *args, **{**kwargs, "mp_policy": own})
        return fully_shard(module, *args, **kwargs)

    fsdp.fully_shard = fully_shard_with_polyattn


def _apart(root: nn.Module, casts: bool, ignored: set[Any]) -> list[PolyAttention]:
    """Returns the polynomials inside of a module that need a group of their own."""
    inside = [module for module in root.modules() if isinstance(module, PolyAttention) and module is not root]
    own = {parameter for child in inside for parameter in child.parameters()}
    others = {p.dtype for p in root.parameters() if p not in own and p.requires_grad}
    return [
        child
        for child in inside
        if not ignored.intersection(child.parameters())
        and (casts or {p.dtype for p in child.parameters() if p.requires_grad} - others)
    ]
