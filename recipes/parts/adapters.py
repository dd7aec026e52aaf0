"""LoRA adapters (PEFT) on a polynomial model: what trains, and what is saved beside them."""

from __future__ import annotations

import copy
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel

from hf_polyattn.patching.core import is_patched
from hf_polyattn.patching.families import attention_sites
from hf_polyattn.patching.patched import patched_layers
from hf_polyattn.patching.saved_config import CONFIG_KEY

from .arguments import FinetuningArguments


def add_adapters(model: PreTrainedModel, arguments: FinetuningArguments, new_modules: tuple[str, ...]) -> Any:
    """Returns a model whose own weights are frozen: LoRA adapters, polynomials and new modules are trained."""
    polynomials = ("polyattn",) if getattr(model.config, CONFIG_KEY, None) else ()
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_targets or "all-linear",
        modules_to_save=[*polynomials, *new_modules] or None,
    )
    return get_peft_model(model, config)


def config_of_base(model: Any) -> PreTrainedConfig:
    """Returns the config with which a softmax checkpoint becomes the base of a trained adapter.

    It names the polynomials by layer: one that names modules is of a saved model, which must have them all.
    """
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    if is_patched(base):
        state = getattr(config, CONFIG_KEY)
        del state["modules"]
        numbers = {site.path: site.layer for site in attention_sites(base)}
        state["layer_specs"] = {str(numbers[path]): str(layer.config.spec) for path, layer in patched_layers(base)}
    return config
