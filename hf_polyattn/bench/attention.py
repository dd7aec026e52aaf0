"""The attentions that are timed against each other: polynomial, and every softmax that runs here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import polynomial_attention
from ..spec import Polynomial
from .cases import Case, Spec

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def polynomial(spec: Spec, case: Case, tensors: list[Tensor], backend: str) -> Callable[..., Tensor]:
    """Returns the operator as a patched layer calls it."""
    parsed = Polynomial.parse(spec.spec)
    query = tensors[0]
    coefficients = torch.tensor([parsed.initial_coefficients()] * case.heads, device=query.device)
    settings: dict[str, Any] = {"monomial": not spec.calibrated}
    if spec.calibrated:
        coefficients = (coefficients + 0.1).requires_grad_()
        center = torch.full(query.shape[:3], 0.5, device=query.device, requires_grad=True)
        settings = {"center": center, "radius": torch.full((case.heads,), 6.0, device=query.device), "clamp": True}

    def attend(query: Tensor, key: Tensor, value: Tensor, backend: str = backend) -> Tensor:
        batch, _, q_len, _ = query.shape
        own = {name: value[:batch, :, :q_len] if name == "center" else value for name, value in settings.items()}
        k_len = key.shape[2]
        if case.causal and q_len < k_len:  # the last rows of a sequence, as `verify` gives them
            stops = torch.arange(k_len - q_len + 1, k_len + 1, device=query.device)
            own["ranges"] = torch.stack([torch.zeros_like(stops), stops], -1)[None]
        output: Tensor = polynomial_attention(
            query,
            key,
            value,
            coefficients,
            causal=case.causal and q_len == k_len,
            power=parsed.power,
            normalizer=parsed.normalizer,
            backend=backend,
            **own,
        )
        return output

    return attend


def softmaxes(device: str, dtype: torch.dtype, case: Case) -> dict[str, Attention]:
    """Returns the softmax attentions that run here, by name."""
    grouped = case.heads != case.kv_heads

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=case.causal, enable_gqa=grouped)

    found: dict[str, Attention] = {"sdpa": sdpa}
    if device == "cpu":
        return found

    from torch.nn.attention import SDPBackend, sdpa_kernel

    def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(query, key, value)

    found["cudnn"] = cudnn
    for name, package in (("flash_attention_3", "flash_attn_interface"), ("flash_attention_2", "flash_attn")):
        try:
            function = __import__(package).flash_attn_func
        except ImportError:
            continue
        found[name] = partial(_flash, function, case.causal)
    tensors = replace(case, batch=1).tensors(device, dtype)
    return {name: attend for name, attend in found.items() if _runs(attend, tensors)}


def _flash(function: Callable[..., Any], causal: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    result = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=causal)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _runs(attend: Attention, tensors: list[Tensor]) -> bool:
    try:
        attend(*tensors)
    except RuntimeError:  # a kernel that does not know this dtype, head dim or device
        return False
    return True


def run_once(attend: Attention, tensors: list[Tensor], kind: str) -> None:
    """Runs one `forward` or `forward_backward` pass."""
    if kind == "forward":
        with torch.no_grad():
            attend(*tensors)
        return
    output = attend(*(tensor.detach().requires_grad_() for tensor in tensors))
    output.backward(torch.ones_like(output))  # type: ignore[no-untyped-call]
