"""The Llama, and stories that it tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel


@pytest.fixture
def llama(pretrained: Callable[..., Any]) -> PreTrainedModel:
    return pretrained("llama", "AutoModelForCausalLM")


@pytest.fixture(scope="session")
def told(pretrained: Callable[..., Any]) -> Callable[[int], Tensor]:
    """`told(count)` returns so many stories of the Llama itself, int64 (count, 61)."""

    def tell(count: int) -> Tensor:
        torch.manual_seed(0)
        model = pretrained("llama", "AutoModelForCausalLM")
        start = torch.ones(count, 1, dtype=torch.long)
        return model.generate(start, attention_mask=start, do_sample=True, min_new_tokens=60, max_new_tokens=60)

    return tell
