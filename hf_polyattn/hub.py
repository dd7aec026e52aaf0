"""Saving and loading: patched models go through `save_pretrained` and `from_pretrained` like any others.

The hooks that importing `hf_polyattn` installs, on `PreTrainedModel` and on `Trainer`.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from .attention import register
from .core import CHILD_NAME, PolyAttention
from .patch import attach_saved


def install_on_models(modeling_utils: Any) -> None:
    """Registers "polyattn" and makes models build their polynomial modules when their config names them.

    Wraps two methods of `PreTrainedModel`: `post_init`, which runs for every model and submodel once its
    modules exist, and `_initialize_weights`, which fills parameters that a checkpoint does not have.
    """
    register()
    model_class = modeling_utils.PreTrainedModel
    post_init, initialize = model_class.post_init, model_class._initialize_weights

    @wraps(post_init)
    def post_init_with_polyattn(self: Any, *args: Any, **kwargs: Any) -> None:
        attach_saved(self)
        post_init(self, *args, **kwargs)
        if any(isinstance(module, PolyAttention) for module in self.modules()):
            self._keep_in_fp32_modules_strict.add(CHILD_NAME)

    @wraps(initialize)
    def initialize_with_polyattn(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(module, PolyAttention):
            initialize(self, module, *args, **kwargs)
        elif not getattr(module, "_is_hf_initialized", False):
            if not all(
                getattr(tensor, "_is_hf_initialized", False) for tensor in module.state_dict(keep_vars=True).values()
            ):
                module.reset_parameters()
            module._is_hf_initialized = True

    model_class.post_init = post_init_with_polyattn
    model_class._initialize_weights = initialize_with_polyattn


def install_on_trainer(trainer: Any) -> None:
    """Keeps weight decay away from polynomials in `Trainer`: a decayed coefficient is another polynomial."""
    trainer_class = trainer.Trainer
    decay_names = trainer_class.get_decay_parameter_names

    @wraps(decay_names)
    def decay_names_without_polyattn(self: Any, model: Any) -> list[str]:
        return [name for name in decay_names(self, model) if CHILD_NAME not in name.split(".")]

    trainer_class.get_decay_parameter_names = decay_names_without_polyattn
