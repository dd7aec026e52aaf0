"""Looking at a patched model: where its polynomials are, and the model inside of its wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import PatchError
from .core import CHILD_NAME, PolyAttention, is_patched


def patched_layers(model: nn.Module) -> list[tuple[str, PolyAttention]]:
    """Returns (path of the attention module, its `PolyAttention`) for each polynomial module, in model order.

    Under PEFT's `modules_to_save` it is the trained copy of the active adapter.
    """
    return [(path, active_child(module)) for path, module in patched_modules(pretrained_model(model))]


def spec_of(model: nn.Module) -> str:
    """Returns the spec of a patched model's layers; all of them in layer order, joined by commas, if they differ."""
    specs = [str(child.config.spec) for _, child in patched_layers(model)]
    return ", ".join(specs) if len(set(specs)) > 1 else specs[0]


def pretrained_model(model: nn.Module) -> PreTrainedModel:
    """Returns the `PreTrainedModel` inside a PEFT, DDP, FSDP or compiled wrapper, or the only one inside any module.

    Raises:
        PatchError: there is none, or more than one.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif callable(getattr(inner, "get_base_model", None)):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            return _only_model_inside(model)
    return inner


def _only_model_inside(model: nn.Module) -> PreTrainedModel:
    """Returns the one model of Transformers inside of a module: a SentenceTransformer, a CrossEncoder, one's own."""
    found: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, PreTrainedModel) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    if len(found) == 1:
        return next(iter(found.values()))
    inside = f", with {len(found)} of them inside, at {sorted(found)}: pass one of those" if found else ""
    raise PatchError(
        f"expected a transformers PreTrainedModel or a wrapper around one, got {type(model).__name__}{inside}"
    )


def active_child(module: nn.Module) -> PolyAttention:
    """Returns the `PolyAttention` that a patched attention module runs."""
    child: Any = module._modules[CHILD_NAME]
    if isinstance(child, PolyAttention):
        return child
    if isinstance(getattr(child, "module", None), PolyAttention):  # FullyShardedDataParallel around it
        return child.module  # type: ignore[no-any-return]
    copies = getattr(child, "modules_to_save", {})  # PEFT's ModulesToSaveWrapper
    for adapter in getattr(child, "active_adapters", []):
        if adapter in copies:
            return copies[adapter]  # type: ignore[no-any-return]
    return child.original_module  # type: ignore[no-any-return]


def patched_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns (path, module) of each attention module that has a polynomial, in model order."""
    return [(path, module) for path, module in root.named_modules() if CHILD_NAME in module._modules]


def require_patched(root: PreTrainedModel) -> None:
    """Raises PatchError if no attention module of the model is polynomial."""
    if not is_patched(root):
        raise PatchError(f"{type(root).__name__} is not patched; call patch_model(model, spec) first")


def require_in_memory(root: PreTrainedModel, doing: str) -> None:
    """Raises PatchError if weights of the model are where nobody can write them: offloaded, or partitioned."""
    if any(hasattr(parameter, "ds_id") for parameter in root.parameters()):
        raise PatchError(
            f"{type(root).__name__} cannot be {doing}: DeepSpeed's ZeRO-3 has partitioned its weights, as Transformers "
            "has it do once TrainingArguments or an Accelerator with ZeRO-3 exist. Load it before they do, patch, "
            "calibrate and save; the saved model can be loaded at any time."
        )
    for path, module in root.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,))):
            raise PatchError(
                f"{type(root).__name__} cannot be {doing}: weights are offloaded, at {path!r} (cpu_offload, "
                "disk_offload or a device_map). Load it whole, patch, calibrate and save; offload what is loaded then."
            )


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Has the tensors of a module, which Accelerate may have offloaded, in memory within the block, to be read."""
    with ExitStack() as stack:
        for part in module.modules():
            if hasattr(part, "_hf_hook"):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(part))
        yield


def bare_path(model: PreTrainedModel, path: str) -> str:
    """Returns the path of a module without the prefix that a model with a task head puts before it."""
    prefix = model.base_model_prefix
    if prefix and hasattr(model, prefix):
        return path.removeprefix(prefix + ".")
    return path
