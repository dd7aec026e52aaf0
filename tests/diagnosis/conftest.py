"""The Llama, calibrated and about to be trained, and what it is trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from hf_polyattn import calibrate, patch_model


@pytest.fixture
def inputs(batch: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    found = batch("llama", count=3, length=24)
    return {**found, "labels": found["input_ids"].masked_fill(found["attention_mask"] == 0, -100)}


@pytest.fixture(scope="package")
def calibrated_llama(pretrained: Callable[..., Any], batch: Callable[..., dict[str, Tensor]]) -> Any:
    model = patch_model(pretrained("llama", "AutoModelForCausalLM"), "poly4-l1")
    calibrate(model, [batch("llama", count=3, length=24)], progress=False)
    return model


@pytest.fixture
def llama(calibrated_llama: Any) -> Any:
    return copy.deepcopy(calibrated_llama).train()
