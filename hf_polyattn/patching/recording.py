"""Whether what runs is only recorded, so that nobody may look at values."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.utils import is_tracing

_RECORDING_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def is_recorded(tensor: Tensor | None) -> bool:
    """Whether a compiler, exporter, tracer or CUDA graph records what runs, or a tensor is fake or on meta.

    A value that is looked at then raises, or becomes a constant of the record.
    """
    if is_tracing(tensor):
        return True
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in _RECORDING_MODES):
        return True
    return tensor is not None and tensor.is_meta
