"""Polynomials under FSDP and DeepSpeed: float32 in a bfloat16 model, where sharded parameters have one dtype."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..errors import PatchError

_OVERRIDES: dict[str, Any] = {"mixed_precision": None}  # how polynomials are wrapped otherwise than the rest


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
    """Adds polynomials to what FullyShardedDataParallel's `auto_wrap_policy` wraps, without its mixed precision."""
    initialize = wrapper_class.__init__
    signature = inspect.signature(initialize)

    @wraps(initialize)
    def initialize_with_polyattn(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        module, precision = given.arguments["module"], given.arguments.get("mixed_precision")
        wrapped = {part.module for part in module.modules() if isinstance(part, wrapper_class)}
        flat = not given.arguments.get("use_orig_params", False)
        apart = [child for child in _apart(module, casts=precision is not None or flat) if child not in wrapped]
        if flat:
            _require_uniform(apart)
        if apart:
            given.arguments["auto_wrap_policy"] = _wrapping(apart, given.arguments.get("auto_wrap_policy"))
        try:
            for child in apart:
                child._wrap_overrides = _OVERRIDES  # what FSDP itself sets on batch norms
            initialize(*given.args, **given.kwargs)
        finally:
            for child in apart:
                del child._wrap_overrides

    wrapper_class.__init__ = initialize_with_polyattn


def _require_uniform(polynomials: list[Any]) -> None:
    """Raises PatchError if a polynomial has parameters that train and others: one flat parameter cannot hold both."""
    for child in polynomials:
        if len({parameter.requires_grad for parameter in child.parameters()}) > 1:
            raise PatchError(
                "FullyShardedDataParallel with use_orig_params=False makes one parameter of all in a module, and those "
                "of a polynomial do not all train. Pass use_orig_params=True, or shard with fully_shard, or freeze the "
                "polynomials: PolyAttentionConfig(spec, learnable=False)."
            )


def install_on_deepspeed(deepspeed: Any) -> None:
    """Makes DeepSpeed refuse to train polynomials that it has cast, as it does with all of a model in bf16 and fp16."""
    initialize = deepspeed.initialize

    @wraps(initialize)
    def initialize_with_polyattn(*args: Any, **kwargs: Any) -> Any:
        from .core import PolyAttention

        made = initialize(*args, **kwargs)
        parts = (part for part in made[0].modules() if isinstance(part, PolyAttention))
        dtypes = {parameter.dtype for part in parts for parameter in part.parameters()} - {torch.float32, torch.float64}
        if dtypes:
            raise PatchError(
                f"DeepSpeed has cast the polynomials to {', '.join(sorted(map(str, dtypes)))}, and coefficients do not "
                "survive that. Leave bf16 and fp16 of its config (mixed_precision of Accelerate, bf16 of "
                'TrainingArguments) off, and set "torch_autocast": {"enabled": true, "dtype": "bfloat16"} in it.'
            )
        return made

    deepspeed.initialize = initialize_with_polyattn


def _wrapping(apart: list[Any], policy: Any) -> Any:
    """Returns an `auto_wrap_policy` that wraps some modules beside those of another policy, which may be None."""
    if policy is not None and not callable(policy):  # CustomPolicy
        policy, run = copy.copy(policy), policy._run_policy

        def run_policy(root: nn.Module, ignored: set[nn.Module], options: dict[str, Any]) -> dict[nn.Module, Any]:
            return {**run(root, ignored, options), **{child: {**options, **_OVERRIDES} for child in apart}}

        policy._run_policy = run_policy
        return policy

    def wrap(module: nn.Module, recurse: bool, nonwrapped_numel: int, **kwargs: Any) -> Any:
        if recurse or module in apart:
            return True
        return policy is not None and policy(module, recurse=False, nonwrapped_numel=nonwrapped_numel, **kwargs)

    return wrap


def _apart(root: nn.Module, *, casts: bool = False) -> list[Any]:
    """Returns the polynomials inside of a module that need a group of their own; all of them, if others are cast."""
    from .core import PolyAttention  # this hook may run while `ops` imports torch

    inside = [module for module in root.modules() if isinstance(module, PolyAttention) and module is not root]
    own = {parameter for child in inside for parameter in child.parameters()}
    others = {p.dtype for p in root.parameters() if p not in own and p.requires_grad}
    if casts:
        return [*inside]
    return [child for child in inside if {p.dtype for p in child.parameters() if p.requires_grad} - others]
