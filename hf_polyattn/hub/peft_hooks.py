"""Adapters: PEFT trains, saves and loads polynomials as it does other modules, and forgets none of them."""

from __future__ import annotations

from functools import wraps
from typing import Any

from ..patching.core import PolyAttention
from .hooks import refuse_adapter


def install_on_wrappers(other: Any) -> None:
    """Keeps PEFT's copies of polynomials (`modules_to_save`) from asking for gradients that they never get.

    Wraps the function in `peft.utils.other` by which PEFT unfreezes every parameter of a copy.
    """
    set_requires_grad = getattr(other, "_set_layer_requires_grad", None)
    if set_requires_grad is None:
        return

    @wraps(set_requires_grad)
    def set_requires_grad_with_polyattn(layer: Any, requires_grad: bool) -> None:
        set_requires_grad(layer, requires_grad)
        for module in getattr(layer, "modules", tuple)():
            if isinstance(module, PolyAttention):
                module.freeze_unused()

    other._set_layer_requires_grad = set_requires_grad_with_polyattn


def install_on_peft(peft_model: Any) -> None:
    """Makes PEFT refuse an adapter with trained polynomials (`modules_to_save`) on a model that has none."""
    model_class = peft_model.PeftModel
    load_adapter = model_class.load_adapter

    @wraps(load_adapter)
    def load_adapter_with_polyattn(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_adapter(self, *args, **kwargs)
        refuse_adapter(result.unexpected_keys)
        return result

    model_class.load_adapter = load_adapter_with_polyattn
