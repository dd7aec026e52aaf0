"""The checkpoints under their task heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

HEADS = [
    ("minilm", "AutoModel"),
    ("minilm", "AutoModelForMaskedLM"),
    ("minilm", "AutoModelForSequenceClassification"),
    ("gpt2-tinystories", "AutoModelForCausalLM"),
    ("gpt2-tinystories", "AutoModelForTokenClassification"),
    ("gpt2-zinc", "AutoModel"),
    ("llama", "AutoModel"),
    ("llama", "AutoModelForCausalLM"),
    ("llama", "AutoModelForTokenClassification"),
    ("vit", "AutoModel"),
    ("vit", "AutoModelForImageClassification"),
]
heads = pytest.mark.parametrize(("name", "head"), HEADS, ids=[f"{n}-{h.removeprefix('Auto')}" for n, h in HEADS])


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)[0]


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Everything of a model that a patch could leave a trace in, weights excepted."""
    modules = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    return modules, list(model.state_dict()), model.config.to_json_string(), sorted(vars(model.config))
