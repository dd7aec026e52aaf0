"""The formula of DESIGN.md in numpy, and what a call of the operator can be asked for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import Shape
from torch import Tensor

from hf_polyattn import polynomial_attention
from hf_polyattn.ops import BACKENDS, chunked, packed_ranges
from hf_polyattn.ops.call import Call
from hf_polyattn.spec import NORMALIZERS

SHAPE: Shape = (2, 4, 2, 5, 7)
# Those that run everywhere and in float64; test_cpu.py, interpreter/ and gpu/ test the kernels.
backends = pytest.mark.parametrize("backend", ["chunked", "reference"])
normalizers = pytest.mark.parametrize("normalizer", NORMALIZERS)


def noise(*size: int, seed: int = 7) -> Tensor:
    """Random numbers in float64, unlike those of kernel_cases."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padding(shape: Shape, rows: int = 1) -> Tensor:
    """(B, 1, rows, Tk): entry b sees all but its first b + 1 keys, as with left padding."""
    batch, _, _, _, k_len = shape
    return (torch.arange(k_len) > torch.arange(batch)[:, None])[:, None, None].expand(-1, 1, rows, -1)


def row_ranges(shape: Shape) -> Tensor:
    """(1, Tq, 2): each row sees some keys in the middle, the last row none."""
    start = torch.arange(shape[3]) % 3
    stop = (start + 3).clamp(max=shape[4])
    return torch.stack([start, torch.where(torch.arange(shape[3]) == shape[3] - 1, start, stop)], dim=-1)[None]


# Name -> settings for B, H, G, Tq, Tk. Without them the result is another one.
FEATURES: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "key-padding": lambda s: {"mask": padding(s)},
    "padding-4d": lambda s: {"mask": padding(s, rows=s[3])},
    "dense-mask": lambda s: {"mask": noise(s[0], s[1], s[3], s[4]) > 0},
    "mask-per-head": lambda s: {"mask": noise(1, s[1], 1, s[4]) > 0},
    "mask-per-row": lambda s: {"mask": noise(1, 1, s[3], s[4]) > 0},
    "ranges": lambda s: {"ranges": torch.tensor([[[1, s[4]]], [[0, s[4] - 2]]])[: s[0]]},
    "ranges-per-row": lambda s: {"ranges": row_ranges(s)},
    "packed": lambda s: {"ranges": packed_ranges(torch.tensor([0, 2, 2, 5]), s[3]), "causal": True},
    "causal": lambda s: {"causal": True},
    "window": lambda s: {"window": 2},
    "causal-window": lambda s: {"causal": True, "window": 2},
    "causal-padding": lambda s: {"causal": True, "mask": padding(s)},
    "ranges-window-mask": lambda s: {"ranges": row_ranges(s), "window": 4, "mask": noise(1, 1, s[3], s[4]) > -1},
    "scaling": lambda s: {"scaling": 0.9},
    "center": lambda s: {"center": 0.7},
    "center-per-head": lambda s: {"center": noise(s[1])},
    "center-per-row": lambda s: {"center": noise(s[0], s[1], s[3])},
    "radius": lambda s: {"radius": 1.7},
    "radius-per-head": lambda s: {"radius": noise(s[1]).abs() + 0.5},
    "clamp": lambda s: {"clamp": True},
    "interval": lambda s: {
        "clamp": True,
        "center": noise(s[0], s[1], s[3]),
        "radius": noise(s[1]).abs() + 0.5,
        "causal": True,
    },
}
features = pytest.mark.parametrize("feature", FEATURES)
DENSE: dict[str, Callable[[Shape], dict[str, Any]]] = {"dense": lambda s: {}}


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    *,
    mask: Tensor | None = None,
    ranges: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    scaling: float | None = None,
    power: int = 1,
    normalizer: str = "rsqrt",
    center: float | Tensor = 0.0,
    radius: float | Tensor = 1.0,
    clamp: bool = False,
) -> Tensor:
    """The formula of DESIGN.md, one weight after another, in numpy."""
    batch, heads, q_len, head_dim = query.shape
    groups, k_len = key.shape[1:3]
    q, k, v, c = (tensor.detach().double().numpy() for tensor in (query, key, value, coefficients))
    m = np.broadcast_to(np.ones(()) if mask is None else mask.numpy(), (batch, heads, q_len, k_len))
    spans = np.broadcast_to(np.array([0, k_len]) if ranges is None else ranges.numpy(), (batch, q_len, 2))
    centers = np.asarray(center)
    centers = np.broadcast_to(centers[:, None] if centers.ndim == 1 else centers, (batch, heads, q_len))
    radii = np.broadcast_to(np.asarray(radius), heads)
    out = np.zeros((batch, q_len, heads, v.shape[3]))
    for b, h, i in np.ndindex(batch, heads, q_len):
        g = h // (heads // groups)
        seen = [
            j
            for j in range(k_len)
            if m[b, h, i, j]
            and spans[b, i, 0] <= j < spans[b, i, 1]
            and not (causal and j > i)
            and not (window is not None and abs(i - j) >= window)
        ]
        total = 0.0
        for j in seen:
            x = (head_dim**-0.5 if scaling is None else scaling) * float(np.dot(q[b, h, i], k[b, g, j]))
            t = (x - centers[b, h, i]) / radii[h]
            if clamp:
                t = min(1.0, max(-1.0, t))
            w = sum(c_k * t**degree for degree, c_k in enumerate(c[h])) ** power
            total += abs(w)
            out[b, i, h] += w * v[b, g, j]
        n = max(1, len(seen))
        out[b, i, h] *= {"rsqrt": n**-0.5, "mean": 1 / n, "none": 1.0, "l1": 1 / (1e-37 + total)}[normalizer]
    return torch.from_numpy(out)


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float(((one - other).abs().max() / other.abs().max()).detach())


def make_call(tensors: list[Tensor], **settings: Any) -> Call:
    """The call that the operator hands to a backend."""
    calls: list[Call] = []
    spy = SimpleNamespace(forward=lambda call: calls.append(call) or chunked.forward(call))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(BACKENDS["chunked"]), "load", lambda backend: spy)
        with torch.no_grad():
            polynomial_attention(*tensors, **settings, backend="chunked")
    return calls[0]
