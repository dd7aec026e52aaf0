"""What the sweep compares with, and what it looks for: an attention function of its own, and softmax where it hides."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface


class Oracle:
    """Stands in for the softmax attention of an unpatched model: x³/√n in the modules named, softmax elsewhere.

    Attributes:
        polynomial: the modules that compute x³/√n.
        noise: relative size of a random error put on their output.
        queries: shape (B, H, Tq, D) of the queries of each module that ran.
        key_lengths: Tk of each module that ran.
    """

    def __init__(self, polynomial: set[nn.Module], noise: float = 0.0) -> None:
        self.polynomial = polynomial
        self.noise = noise
        self.queries: dict[nn.Module, torch.Size] = {}
        self.key_lengths: dict[nn.Module, int] = {}

    def sdpa(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        self.queries[module], self.key_lengths[module] = query.shape, key.shape[2]
        if module not in self.polynomial:
            kwargs.pop("output_attentions", None)
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
            )
        wide = torch.float64
        key, value = (t.to(wide).repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        scores = (query.to(wide) @ key.transpose(2, 3)) * (query.shape[3] ** -0.5 if scaling is None else scaling)
        visible = torch.ones_like(scores, dtype=torch.bool)
        if attention_mask is not None:
            visible &= attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1e4
        elif query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            visible = visible.tril()
        count = visible.sum(-1, keepdim=True).clamp(min=1).to(wide)
        output = (scores**3 * visible / count.sqrt()) @ value
        output = output * (1.0 + self.noise * torch.randn_like(output))
        return output.transpose(1, 2).to(query.dtype).contiguous(), None

    def eager(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """The same for models that run "eager": there only a mask hides keys."""
        return self.sdpa(*args, **{**kwargs, "is_causal": False})

    @contextmanager
    def installed(self) -> Iterator[Oracle]:
        """Replaces what Transformers calls "sdpa" and "eager"."""
        functions = AttentionInterface._global_mapping
        before = dict(functions)
        functions.update(sdpa=self.sdpa, eager=self.eager)
        try:
            yield self
        finally:
            functions.clear()
            functions.update(before)


class SoftmaxAudit(TorchDispatchMode):
    """Records the modules inside which a softmax is computed, by whatever means."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        self.found: set[nn.Module] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.running and re.search(r"(?<!log_)softmax|dot_product|multi_head|transformer_encoder", function.name()):
            self.found.add(self.running[-1])
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> SoftmaxAudit:
        hooks = torch.nn.modules.module
        self.handles = [
            hooks.register_module_forward_pre_hook(lambda module, inputs: self.running.append(module)),
            hooks.register_module_forward_hook(lambda module, inputs, output: self._left(), always_call=True),
        ]
        return super().__enter__()

    def _left(self) -> None:
        self.running.pop()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self.handles:
            handle.remove()
