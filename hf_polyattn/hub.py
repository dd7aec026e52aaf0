"""Saving and loading: patched models go through `save_pretrained` and `from_pretrained` like any others.

The hooks that importing `hf_polyattn` installs, on `PreTrainedModel`, on `Trainer` and on PEFT. They may run in
the middle of any import of Transformers, so this file imports nothing that needs `transformers.modeling_utils`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch

from .attention import register
from .core import CHILD_NAME, PolyAttention
from .errors import PatchError


def install_on_models(modeling_utils: Any) -> None:
    """Registers "polyattn" and makes models build their polynomial modules when their config names them.

    Wraps four methods of `PreTrainedModel`: `post_init`, which runs for every model and submodel once its
    modules exist; `_initialize_weights`, which fills parameters that a checkpoint does not have;
    `_adjust_missing_and_unexpected_keys`, which hears of weights that a model does not have; and `save_pretrained`,
    which writes the config of a model whose submodel was patched by itself.
    """
    register(modeling_utils.AttentionInterface)
    model_class = modeling_utils.PreTrainedModel
    post_init, initialize = model_class.post_init, model_class._initialize_weights
    adjust_keys, save = model_class._adjust_missing_and_unexpected_keys, model_class.save_pretrained

    @wraps(post_init)
    def post_init_with_polyattn(self: Any, *args: Any, **kwargs: Any) -> None:
        from .patch import attach_saved

        attach_saved(self)
        post_init(self, *args, **kwargs)
        if any(isinstance(module, PolyAttention) for module in self.modules()):
            self._keep_in_fp32_modules_strict.add(CHILD_NAME)

    @wraps(initialize)
    def initialize_with_polyattn(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(module, PolyAttention):
            initialize(self, module, *args, **kwargs)
        elif not getattr(module, "_is_hf_initialized", False):
            _reset_missing(module)
            module._is_hf_initialized = True  # type: ignore[assignment]

    @wraps(adjust_keys)
    def adjust_keys_with_polyattn(self: Any, loading_info: Any, *args: Any, **kwargs: Any) -> None:
        _refuse_softmax(self, loading_info.unexpected_keys)
        adjust_keys(self, loading_info, *args, **kwargs)

    @wraps(save)
    def save_with_guard(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .patch import armed_configs

        armed_configs(self)
        return save(self, *args, **kwargs)

    model_class.post_init = post_init_with_polyattn
    model_class.save_pretrained = save_with_guard
    model_class._initialize_weights = initialize_with_polyattn
    model_class._adjust_missing_and_unexpected_keys = adjust_keys_with_polyattn


def install_on_trainer(trainer: Any) -> None:
    """Keeps weight decay away from polynomials in `Trainer`, and lets its trackers log what `MonitorCallback` has.

    A decayed coefficient is another polynomial. And `Trainer` calls its trackers before any callback of the user,
    so that what a callback adds to the logs would not reach them.
    """
    trainer_class = trainer.Trainer
    decay_names, log = trainer_class.get_decay_parameter_names, trainer_class.log

    @wraps(decay_names)
    def decay_names_without_polyattn(self: Any, model: Any) -> list[str]:
        return [name for name in decay_names(self, model) if CHILD_NAME not in name.split(".")]

    @wraps(log)
    def log_with_polyattn(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:  # of a training step, not of an evaluation or of the whole training
            for callback in self.callback_handler.callbacks:
                logs.update(getattr(callback, "polyattn_scalars", dict)())
        log(self, logs, *args, **kwargs)

    trainer_class.get_decay_parameter_names = decay_names_without_polyattn
    trainer_class.log = log_with_polyattn


def install_on_peft(peft_model: Any) -> None:
    """Makes PEFT refuse an adapter with trained polynomials (`modules_to_save`) on a model that has none."""
    model_class = peft_model.PeftModel
    load_adapter = model_class.load_adapter

    @wraps(load_adapter)
    def load_adapter_with_polyattn(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_adapter(self, *args, **kwargs)
        softmax = _polynomial_paths(result.unexpected_keys)
        if softmax:
            raise PatchError(
                f"the adapter has trained polynomial attention at {sorted(softmax)}, but the base model is softmax "
                "there. Call patch_model(base_model, spec) with the spec of the training before loading the adapter."
            )
        return result

    model_class.load_adapter = load_adapter_with_polyattn


@torch.no_grad()
def _reset_missing(layer: PolyAttention) -> None:
    """Sets the tensors of a polynomial that the checkpoint did not have; those that it had stay as loaded."""
    tensors = layer.state_dict(keep_vars=True).values()
    loaded = [(tensor, tensor.clone()) for tensor in tensors if getattr(tensor, "_is_hf_initialized", False)]
    if len(loaded) == len(tensors):
        return
    layer.reset_parameters()
    for tensor, value in loaded:
        tensor.copy_(value)


def _refuse_softmax(model: Any, unexpected_keys: Iterable[str]) -> None:
    """Raises PatchError if a checkpoint has polynomials for modules that the model would run as softmax."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    softmax = set()
    for path in _polynomial_paths(unexpected_keys):
        # The checkpoint may be of the bare model and this one have a head, or the other way round.
        softmax.update({path, prefix + path, path.removeprefix(prefix)} & modules.keys())
    if softmax:
        raise PatchError(
            f"the checkpoint has polynomial attention at {sorted(softmax)}, but the config given to "
            f"{type(model).__name__} does not say so and it would silently be softmax. Load the checkpoint with "
            "its own config, or call unpatch_model(model) before saving it."
        )


def _polynomial_paths(keys: Iterable[str]) -> set[str]:
    """Returns the paths of the attention modules to whose polynomials state dict keys belong."""
    return {path for path, found, _ in (key.partition(f".{CHILD_NAME}.") for key in keys) if found}
