"""The query rows that a fit sees: what softmax made of them, in chunks that bound memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...errors import CalibrationError
from ..capture import Observation

_CHUNK_SCORES = 2**21


@dataclass(frozen=True, eq=False)
class Rows:
    """Real query rows of a few batch entries; float32, what belongs to scores float64 where they are `packed_rows`.

    Attributes:
        query: (b, H, Tq, D).
        value: (b, G, Tk, Dv).
        target: softmax's output, (b, H, Tq, Dv).
        scores: (b, H, Tq, Tk), 0 where not visible.
        visible: float 0 or 1, (b, 1 or H, Tq, Tk).
        count: n_i, (b, 1 or H, Tq).
        weight: 1 for real rows that see a key, else 0, (b, H, Tq).
        scaling: of the scores.
        entries: numbers of the batch entries among all that the layer sees, (b,); None where they are counted as they
            come.
    """

    query: Tensor
    value: Tensor
    target: Tensor
    scores: Tensor
    visible: Tensor
    count: Tensor
    weight: Tensor
    scaling: float
    entries: Tensor | None = None

    @property
    def bytes(self) -> int:
        """What they take, without what is found out about them."""
        tensors = (self.query, self.value, self.target, self.scores, self.visible)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def log_partition_sums(self) -> Tensor:
        """Returns lse_i, 0 for rows without weight, (b, H, Tq)."""
        return self._log_partition_sums

    @cached_property
    def _log_partition_sums(self) -> Tensor:
        lse = self.scores.masked_fill(self.visible == 0.0, -torch.inf).logsumexp(-1)
        return lse.masked_fill(self.weight == 0.0, 0.0)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Returns the mean and the variance of the visible scores, (b, H, Tq) each."""
        return self._moments

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        mean = self.scores.sum(-1) / self.count
        left = (self.scores - mean.unsqueeze(-1)).mul_(self.visible)
        return mean, left.square_().sum(-1) / self.count

    def fixed_scale(self, normalizer: str) -> Tensor:
        """Returns r_i of a normalizer that does not look at the scores, (b, 1 or H, Tq)."""
        if normalizer == "rsqrt":
            return self.count.rsqrt()
        return 1.0 / self.count if normalizer == "mean" else torch.ones_like(self.count)

    def grouped(self, tensor: Tensor) -> Tensor:
        """Returns (b, 1 or H, …) as (b, 1 or G, 1, 1 or H / G, …): beside the candidates of each head."""
        if tensor.shape[1] == 1:
            return tensor[:, :, None, None]
        return tensor.reshape(len(tensor), self.value.shape[1], 1, -1, *tensor.shape[2:])

    def apply(self, weights: Tensor) -> Tensor:
        """Returns weights · values, (b, H, Tq, Dv)."""
        b, heads, q_len, k_len = weights.shape
        out = weights.reshape(b, self.value.shape[1], -1, k_len) @ self.value
        return out.reshape(b, heads, q_len, -1)


def observed_rows(path: str, observation: Observation, stride: int) -> Iterator[Rows]:
    """Yields every `stride`-th query row as it is, padding included, in chunks of batch entries.

    Raises:
        CalibrationError: scores or outputs of the module at `path` that are not finite.
    """
    batch, heads, q_len, _ = observation.query.shape
    k_len = observation.key.shape[2]
    every = slice(None, None, stride)
    step = max(1, _CHUNK_SCORES // max(1, heads * len(range(q_len)[every]) * k_len))
    visible = observation.visible().expand(batch, -1, q_len, -1)[:, :, every]
    real = observation.real
    if real is None:
        real = torch.ones(batch, q_len, dtype=torch.bool, device=visible.device)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        yield rows_of(
            path,
            observation.query[part, :, every].float(),
            observation.key[part].float(),
            observation.value[part].float(),
            observation.output[part, every].float().transpose(1, 2),
            visible[part],
            real[part, every],
            observation.scaling,
        )


def rows_of(
    path: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Tensor,
    visible: Tensor,
    real: Tensor,
    scaling: float,
    entries: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Rows:
    """Returns the rows of queries and keys, float32, and of softmax's output for them.

    Args:
        path: of the attention module.
        query, value, target, scaling, entries: of `Rows`.
        key: (b, G, Tk, D).
        visible: bool (b, 1 or H, Tq, Tk).
        real: bool (b, Tq).
        dtype: of the scores.

    Raises:
        CalibrationError: scores or outputs of the module at `path` that are not finite.
    """
    batch, heads, q_len, head_dim = query.shape
    count = visible.sum(-1)
    weight = (real[:, None] & (count > 0)).expand(-1, heads, -1)
    grouped = query.to(dtype).reshape(batch, key.shape[1], -1, head_dim)
    scores = (grouped @ key.to(dtype).transpose(-1, -2)).reshape(batch, heads, q_len, key.shape[2]).mul_(scaling)
    target = target.masked_fill(~weight.unsqueeze(-1), 0.0)
    if not (_finite(scores) and _finite(target)):
        raise CalibrationError(f"layer {path!r} has non-finite scores or outputs under softmax; check the checkpoint")
    seen = visible.to(dtype)
    return Rows(
        query=query,
        value=value,
        target=target,
        scores=scores.mul_(seen),
        visible=seen,
        count=count.clamp(min=1).to(dtype),
        weight=weight.to(dtype),
        scaling=scaling,
        entries=entries,
    )


def _finite(tensor: Tensor) -> bool:
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())  # a NaN is both of its ends
