"""Softmax layers under a monitor: seen where they call PyTorch's scaled dot product attention, and not changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import PatchError
from ..patching.core import CHILD_NAME
from ..patching.families import attention_sites
from ..patching.masking import split_mask
from ..patching.patched import pretrained_model
from ..patching.saved_config import IMPLEMENTATIONS
from .sampling import sample_rows, softmax_norms


class SoftmaxProbe:
    """The hooks of one softmax attention module.

    Attributes:
        path: of the module in the model.
        record: what was seen last, 0-dim tensors.

    Args:
        path: of the module.
        module: the attention module, which runs `scaled_dot_product_attention`.
        due: asked before each forward pass whether it is to be recorded.
    """

    def __init__(self, path: str, module: nn.Module, due: Callable[[dict[str, Tensor]], bool]) -> None:
        self.path, self.due = path, due
        self.record: dict[str, Tensor] = {}
        self.watch: Any = None  # a `_Watch` while a forward pass is under way; PyTorch does not type entering it
        self.handles: list[Any] = [
            module.register_forward_pre_hook(self),
            module.register_forward_hook(self, always_call=True),
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return Unwatched, ()  # a copy of the model is another model

    def __call__(self, module: nn.Module, args: Any, *output: Any) -> None:
        """Watches from before a forward pass, which has no output yet, until after it."""
        if self.watch is not None:
            self.watch.__exit__(None, None, None)
            self.watch = None
        if output or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.due(self.record):
            return
        self.watch = _Watch(self.see)
        self.watch.__enter__()

    @torch.no_grad()
    def see(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **others: Any,
    ) -> None:
        """Sees a call of `scaled_dot_product_attention`; arguments as there."""
        if query.numel() == 0:
            return
        mask, _ = split_mask(attn_mask)
        with torch.autocast(query.device.type, enabled=False):
            norms = softmax_norms(sample_rows(query, key, mask=mask, causal=is_causal, scaling=scale))
        self.record = dict(zip(("attention_norm", "jacobian_norm"), norms, strict=True))

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()


class Unwatched:
    """The hook of a copied or unpickled model: does nothing."""

    def __call__(self, *arguments: Any) -> None:
        """Does nothing."""


class _Watch(TorchFunctionMode):
    """Shows each call of `scaled_dot_product_attention` while it is entered, and changes none."""

    def __init__(self, see: Callable[..., None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.see(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def softmax_probes(model: nn.Module, due: Callable[[dict[str, Tensor]], bool]) -> list[SoftmaxProbe]:
    """Returns a probe for each attention module that is softmax and could be polynomial, in model order.

    Raises:
        PatchError: one that does not run `scaled_dot_product_attention`.
    """
    probes = []
    for site in attention_sites(pretrained_model(model)):
        if CHILD_NAME in site.module._modules or site.obstacle is not None:
            continue
        config: Any = site.module.config
        if config._attn_implementation not in ("sdpa", *IMPLEMENTATIONS):
            raise PatchError(
                f"the norms of {site.path!r} cannot be watched: its softmax is {config._attn_implementation!r}. Load "
                'the model with attn_implementation="sdpa".'
            )
        probes.append((site.path, site.module))
    return [SoftmaxProbe(path, module, due) for path, module in probes]
