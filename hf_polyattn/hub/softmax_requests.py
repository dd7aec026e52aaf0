"""Softmax on request, one rule: polynomial attention ends with `unpatch_model`, or for a while in `softmax_attention`.

Whatever else of Transformers asks for another attention implementation is refused, and the model left as it was: it
would be softmax with polynomials in it, or polynomial although something else was asked for.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from ..errors import PatchError
from ..patching.core import is_patched
from ..patching.saved_config import IMPLEMENTATIONS, refusal


def keep_polynomials(model_class: Any) -> None:
    """Makes `set_attn_implementation` refuse to take polynomial attention away."""
    set_implementation = model_class.set_attn_implementation

    @wraps(set_implementation)
    def set_implementation_with_polyattn(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        from ..patching.governing import governing_configs

        governing = [owner.config for owner in governing_configs(self)]
        if governing and isinstance(attn_implementation, str) and attn_implementation not in IMPLEMENTATIONS:
            raise PatchError(refusal(type(self).__name__, attn_implementation))
        before = [(config, config._attn_implementation) for config in _configs(self)] if governing else []
        set_implementation(self, attn_implementation, *args, **kwargs)
        if any(config._attn_implementation not in IMPLEMENTATIONS for config in governing):
            for config, implementation in before:
                config._attn_implementation_internal = implementation
            raise PatchError(refusal(type(self).__name__, attn_implementation))

    model_class.set_attn_implementation = set_implementation_with_polyattn


def install_on_continuous_batching(continuous_api: Any) -> None:
    """Makes continuous batching (`generate_batch`) refuse patched models itself: its caches are paged."""
    manager_class = continuous_api.ContinuousBatchingManager
    initialize = manager_class.__init__

    @wraps(initialize)
    def initialize_with_polyattn(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if is_patched(model):
            raise PatchError(
                f"continuous batching runs softmax over paged caches, and this {type(model).__name__} has polynomial "
                "attention. Use model.generate(...), with padded batches; or unpatch_model(model) for softmax."
            )
        initialize(self, model, *args, **kwargs)

    manager_class.__init__ = initialize_with_polyattn


def _configs(model: Any) -> list[PreTrainedConfig]:
    """Returns every config of a model and of its parts, once."""
    found: dict[int, PreTrainedConfig] = {}
    waiting = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())
