"""Whether what runs is only recorded, so that nobody may look at values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_tracing

_RECORDING_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def install_on_onnx(onnx: Any) -> None:
    """Tells the exporter of `torch.onnx.export(dynamo=False)`, which lacks it, what `torch.linalg.vecdot` is."""

    def vecdot(graph: Any, x: Any, y: Any, dim: Any) -> Any:
        axes = graph.op("Constant", value_t=torch.tensor([onnx.symbolic_helper._get_const(dim, "i", "dim")]))
        return graph.op("ReduceSum", graph.op("Mul", x, y), axes, keepdims_i=0)

    onnx.register_custom_op_symbolic("aten::linalg_vecdot", vecdot, 13)


def is_recorded(tensor: Tensor | None) -> bool:
    """Whether a compiler, exporter, tracer or CUDA graph records what runs, or a tensor is fake or on meta.

    A value that is looked at then raises, or becomes a constant of the record.
    """
    if is_tracing(tensor):
        return True
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in _RECORDING_MODES):
        return True
    return tensor is not None and tensor.is_meta
