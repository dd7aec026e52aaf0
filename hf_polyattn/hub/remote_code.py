"""Code beside the weights, for those who load a polynomial model without this package."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import PatchError
from ..files import written_beside
from ..patching.core import is_patched
from ..patching.patched import bare_path, patched_layers

MODULE = "modeling_polyattn"
_THIS_CHECKPOINT = "# ---------------------------------------------------------------- this checkpoint\n"


def export_remote_code(folder: str | os.PathLike[str]) -> Path:
    """Writes modeling_polyattn.py beside a saved polynomial model, and names it under `auto_map` in its config.json.

    With it, `AutoModel….from_pretrained(folder, trust_remote_code=True)` runs the model in a Transformers without this
    package, in plain PyTorch: the same logits, no kernels, no attention weights. Where this package is installed, the
    file leaves everything to it. Without `trust_remote_code` such a Transformers refuses the model, as before.

    Args:
        folder: of a model saved with `save_pretrained`; it is loaded once, so that what is exported is whole.

    Returns:
        The path of the file.

    Raises:
        PatchError: the folder holds no model, one that is not patched, or one whose class is not of Transformers.
        CheckpointError: the model in the folder is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise PatchError(
            f"{folder} holds no saved model: there is no config.json. Save one with save_pretrained first."
        )
    config = AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None:
        raise PatchError(
            f"{folder}/config.json names architectures {config.architectures}, no class of Transformers. "
            "Save a model of Transformers with save_pretrained, and export that."
        )
    model = model_class.from_pretrained(folder)
    if not is_patched(model):
        raise PatchError(f"the model in {folder} is softmax and needs no code; call patch_model(model, spec) first")
    classes = _auto_classes(config)
    code = folder / f"{MODULE}.py"
    with written_beside(code) as partial:
        partial.write_text(_code(model, sorted(set(classes.values()))), encoding="utf-8")
    _name_in_config(folder / "config.json", classes)
    return code


def _auto_classes(config: PreTrainedConfig) -> dict[str, str]:
    """Returns the model class that each Auto class has for a config."""
    classes = {}
    for name in dir(transformers):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is not None and type(config) in mapping:
            found = mapping[type(config)]
            classes[name] = (found[0] if isinstance(found, tuple) else found).__name__
    return classes


def _code(model: PreTrainedModel, classes: list[str]) -> str:
    """Returns this package's `modeling_polyattn.py` with the heads and the classes of one model."""
    source = Path(__file__).with_name(f"{MODULE}.py").read_text(encoding="utf-8")
    general, marker, _ = source.partition(_THIS_CHECKPOINT)
    heads = "".join(
        f'    "{bare_path(model, path)}": ({layer.heads}, {layer.head_dim}),\n' for path, layer in patched_layers(model)
    )
    table = f"# Query heads and head dim of each attention module.\nHEADS = {{\n{heads}}}\n"
    bodies = "".join(f"\n\nclass {name}(PolynomialModel, transformers.{name}):\n    pass\n" for name in classes)
    return f"{general}{marker}\nimport transformers  # noqa: E402\n\n{table}{bodies}"


def _name_in_config(file: Path, classes: dict[str, str]) -> None:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    content["auto_map"] = {auto: f"{MODULE}.{name}" for auto, name in classes.items()}
    with written_beside(file) as partial:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
