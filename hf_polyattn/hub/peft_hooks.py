"""Adapters: PEFT trains, saves and loads polynomials as it does other modules, and forgets none of them."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any

from ..errors import PatchError
from ..patching.core import CHILD_NAME, PolyAttention, is_patched
from .hooks import check_adapter

# Within `PeftModel.from_pretrained`, which has looked at the base model's polynomials and then loads the adapter.
_restored: ContextVar[bool] = ContextVar("restored", default=False)


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


def install_on_tuners(tuners_utils: Any) -> None:
    """Makes PEFT refuse adapters of a polynomial's own tensors, which no adapter of PEFT can be put on."""
    tuner_class = tuners_utils.BaseTuner
    inject = tuner_class.inject_adapter

    @wraps(inject)
    def inject_adapter_with_polyattn(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config[adapter_name]
        targets = [getattr(config, name, None) or () for name in ("target_parameters", "target_modules")]
        names = [name for given in targets if not isinstance(given, str) for name in given]
        wrong = sorted(name for name in names if CHILD_NAME in name.split("."))
        if wrong:
            raise PatchError(
                f"an adapter cannot have {wrong} as targets: polynomials have a few numbers a head, and are trained as "
                f"they are. Use modules_to_save={[CHILD_NAME]} in the adapter's config instead."
            )
        return inject(self, model, adapter_name, *args, **kwargs)

    tuner_class.inject_adapter = inject_adapter_with_polyattn


def install_on_peft(peft_model: Any) -> None:
    """Makes PEFT save the base model's polynomials with an adapter, and bring them back, or refuse the base model.

    Its cards name the polynomials.
    """
    model_class = peft_model.PeftModel
    save, load, load_adapter = (
        model_class.save_pretrained,
        model_class.from_pretrained.__func__,
        model_class.load_adapter,
    )

    @wraps(save)
    def save_with_polyattn(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = save(self, save_directory, *args, **kwargs)
        given = inspect.signature(save).bind(self, save_directory, *args, **kwargs)
        given.apply_defaults()
        if given.arguments["is_main_process"] and _holds_a_model(self):
            from .adapters import save_polynomials

            for name in given.arguments["selected_adapters"] or self.peft_config:
                folder = Path(save_directory, *([] if name == "default" else [name]))
                save_polynomials(self, folder, given.arguments["kwargs"].get("state_dict"))
        return result

    @wraps(load)
    def load_with_polyattn(cls: Any, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        _restore(model, model_id, kwargs, alone=not getattr(model, "peft_config", None))
        token = _restored.set(True)  # PEFT takes away the hooks that know where offloaded weights are
        try:
            return load(cls, model, model_id, *args, **kwargs)
        finally:
            _restored.reset(token)

    @wraps(load_adapter)
    def load_adapter_with_polyattn(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        others, again = self.peft_config.keys() - {adapter_name}, adapter_name in self.peft_config
        if not _restored.get():
            _restore(self, model_id, kwargs, alone=not others, again=again)
        result = load_adapter(self, model_id, adapter_name, *args, **kwargs)
        check_adapter(self, result.unexpected_keys)
        return result

    load_weights = peft_model.load_peft_weights

    @wraps(load_weights)
    def load_weights_with_polyattn(model_id: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        from .adapters import with_changes

        return with_changes(load_weights(model_id, *args, **kwargs), str(model_id))

    create_card = model_class.create_or_update_model_card

    @wraps(create_card)
    def create_card_with_polyattn(self: Any, output_dir: str) -> None:
        create_card(self, output_dir)
        if is_patched(self):
            from .cards import name_polynomials

            name_polynomials(self, Path(output_dir) / "README.md")

    peft_model.load_peft_weights = load_weights_with_polyattn
    model_class.create_or_update_model_card = create_card_with_polyattn
    model_class.save_pretrained = save_with_polyattn
    model_class.from_pretrained = classmethod(load_with_polyattn)
    model_class.load_adapter = load_adapter_with_polyattn


def _restore(model: Any, source: Any, options: dict[str, Any], **state: bool) -> None:
    if _holds_a_model(model):
        from .adapters import restore_polynomials

        restore_polynomials(model, source, **state, **options)


def _holds_a_model(model: Any) -> bool:
    """Whether there is a model of Transformers; PEFT wraps others, too."""
    from transformers import PreTrainedModel

    return any(isinstance(part, PreTrainedModel) for part in model.modules())
