"""Saving and loading: patched models go through `save_pretrained` and `from_pretrained` like any others.

The hooks that importing `hf_polyattn` installs, on `PreTrainedModel`, on `Trainer` and on PEFT. They may run in
the middle of any import of Transformers, so this file imports nothing that needs `transformers.modeling_utils`.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from .attention import register
from .core import CHILD_NAME, PolyAttention
from .errors import PatchError


def install_on_models(modeling_utils: Any) -> None:
    """Registers "polyattn" and makes models build and check their polynomial modules when their config names them.

    Wraps three methods of `PreTrainedModel`: `post_init`, which runs for every model and submodel once its
    modules exist; `_initialize_weights`, which fills parameters that a checkpoint does not have; and
    `_load_pretrained_model`, after which it is known what a checkpoint has. And `_get_dtype`, the first function of
    a load that knows both the config and the files, and that may read them.
    """
    register(modeling_utils.AttentionInterface)
    model_class = modeling_utils.PreTrainedModel
    post_init, initialize = model_class.post_init, model_class._initialize_weights
    load, get_dtype = model_class._load_pretrained_model, modeling_utils._get_dtype

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

    @wraps(get_dtype)
    def get_dtype_with_polyattn(
        dtype: Any,
        checkpoint_files: Any,
        config: Any,
        sharded_metadata: Any,
        state_dict: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        from .checkpoint import check_files

        check_files(config, checkpoint_files, state_dict, sharded_metadata)
        return get_dtype(dtype, checkpoint_files, config, sharded_metadata, state_dict, *args, **kwargs)

    @wraps(load)
    def load_with_polyattn(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from .checkpoint import check_loaded

        result = load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        if not args and not kwargs:  # `expected_keys`: an adapter's, not the model's
            check_loaded(model, result[0], str(load_config.pretrained_model_name_or_path or "the state dict"))
        return result

    model_class.post_init = post_init_with_polyattn
    model_class._initialize_weights = initialize_with_polyattn
    model_class._load_pretrained_model = staticmethod(load_with_polyattn)
    modeling_utils._get_dtype = get_dtype_with_polyattn


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
        from .checkpoint import polynomial_paths

        softmax = polynomial_paths(result.unexpected_keys)
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
