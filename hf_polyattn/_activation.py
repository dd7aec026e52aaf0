"""Runs the plugin's hooks as soon as the modules of Transformers and PEFT are imported, and not before.

`import transformers` is lazy and so is this package: neither imports torch until a model class is used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The module and function of this package that each module is handed to.
_HOOKS = {
    "transformers.configuration_utils": ("patching.saved_config", "install_on_configs"),  # imported before torch
    "transformers.modeling_utils": ("hub.hooks", "install_on_models"),
    "transformers.generation.continuous_batching.continuous_api": (
        "hub.softmax_requests",
        "install_on_continuous_batching",
    ),
    "transformers.trainer": ("hub.hooks", "install_on_trainer"),
    "peft.utils.other": ("hub.peft_hooks", "install_on_wrappers"),
    "peft.tuners.tuners_utils": ("hub.peft_hooks", "install_on_tuners"),
    "peft.peft_model": ("hub.peft_hooks", "install_on_peft"),
    "sentence_transformers.base.model": ("hub.hooks", "install_on_sentence_transformers"),
    "torch.distributed.fsdp": ("patching.sharding", "install_on_fsdp"),
    "torch.onnx": ("patching.recording", "install_on_onnx"),
    "deepspeed": ("patching.sharding", "install_on_deepspeed"),
}


# The places of modules that were files of this package before it had rooms (version 0.1.0).
_MOVED = {
    **dict.fromkeys(("attention", "core", "families", "masking", "patch", "saved_config"), "patching"),
    **dict.fromkeys(("alignment", "annealing", "calibration", "capture", "conversion", "distillation"), "adaptation"),
    **dict.fromkeys(("fitting", "layerwise", "quality", "training"), "adaptation"),
    **dict.fromkeys(("callback", "inspection", "monitor"), "diagnosis"),
    **dict.fromkeys(("card_template", "cards", "checkpoint", "modeling_polyattn", "pushing", "remote_code"), "hub"),
    **dict.fromkeys(("ops.tune", "ops.tuning"), "ops.triton"),
    "ops.build": "ops.cpu",
}


def _run_hook(module: ModuleType) -> None:
    home, function = _HOOKS[module.__name__]
    getattr(import_module(f".{home}", __package__), function)(module)


class _HookLoader(Loader):
    """A module's own loader, which runs its hook once the module is complete."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _run_hook(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class _HookFinder(MetaPathFinder):
    """Finds the hooked modules as Python would, with a `_HookLoader` around their loader; says where moved ones are."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package == __package__ and name in _MOVED:
            place = f"{package}.{_MOVED[name]}.{name.rpartition('.')[2]}"
            raise ModuleNotFoundError(f"{fullname} is now {place}; public names are in {package} itself", name=fullname)
        if fullname not in _HOOKS:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _HookFinder):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _HookLoader(spec.loader)
                return spec
        return None


def activate() -> None:
    """Installs each hook now if its module is imported already, else at its import. Safe to call again."""
    if any(isinstance(finder, _HookFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _HookFinder())
    for name in _HOOKS.keys() & sys.modules.keys():
        _run_hook(sys.modules[name])
