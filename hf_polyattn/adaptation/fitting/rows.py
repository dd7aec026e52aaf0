"""The query rows that a fit sees: what softmax made of them, in chunks that bound memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import CalibrationError
from ...ops.moments import moments_of
from ..capture import Observation

_CHUNK_SCORES = 2**21


@dataclass(frozen=True, slots=True)
class Rows:
    """Real query rows of a few batch entries; all float32.

    Attributes:
        query: (b, H, Tq, D).
        value: (b, G, Tk, Dv).
        target: softmax's output, (b, H, Tq, Dv).
        scores: (b, H, Tq, Tk), 0 where not visible.
        visible: float 0 or 1, (b, 1 or H, Tq, Tk).
        count: n_i, (b, 1 or H, Tq).
        weight: 1 for real rows that see a key, else 0, (b, H, Tq).
        scaling: of the scores.
    """

    query: Tensor
    value: Tensor
    target: Tensor
    scores: Tensor
    visible: Tensor
    count: Tensor
    weight: Tensor
    scaling: float

    def log_partition_sums(self) -> Tensor:
        """Returns lse_i, 0 for rows without weight, (b, H, Tq)."""
        lse = self.scores.masked_fill(self.visible == 0.0, -torch.inf).logsumexp(-1)
        return lse.masked_fill(self.weight == 0.0, 0.0)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Returns the mean and the variance of the visible scores, (b, H, Tq) each."""
        return moments_of(self.scores, self.visible > 0.0, self.count)

    def fixed_scale(self, normalizer: str) -> Tensor:
        """Returns r_i of a normalizer that does not look at the scores, (b, 1 or H, Tq)."""
        if normalizer == "rsqrt":
            return self.count.rsqrt()
        return 1.0 / self.count if normalizer == "mean" else torch.ones_like(self.count)

    def apply(self, weights: Tensor) -> Tensor:
        """Returns weights · values, (b, H, Tq, Dv)."""
        b, heads, q_len, k_len = weights.shape
        out = weights.reshape(b, self.value.shape[1], -1, k_len) @ self.value
        return out.reshape(b, heads, q_len, -1)


def observed_rows(path: str, observation: Observation, stride: int) -> Iterator[Rows]:
    """Yields every `stride`-th query row, in chunks of batch entries so that memory stays bounded.

    Raises:
        CalibrationError: scores or outputs of the module at `path` that are not finite.
    """
    batch, heads, q_len, head_dim = observation.query.shape
    k_len = observation.key.shape[2]
    every = slice(None, None, stride)
    step = max(1, _CHUNK_SCORES // max(1, heads * len(range(q_len)[every]) * k_len))
    visible = observation.visible().expand(batch, -1, q_len, -1)[:, :, every]
    real = observation.real
    if real is None:
        real = torch.ones(batch, q_len, dtype=torch.bool, device=visible.device)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        query = observation.query[part, :, every].float()
        key, value = observation.key[part].float(), observation.value[part].float()
        seen = visible[part]
        count = seen.sum(-1)
        weight = (real[part, every][:, None] & (count > 0)).expand(-1, heads, -1)
        grouped = query.reshape(query.shape[0], key.shape[1], -1, head_dim)
        scores = (grouped @ key.transpose(-1, -2)).reshape(-1, heads, query.shape[2], k_len) * observation.scaling
        target = observation.output[part, every].float().transpose(1, 2)
        if not bool(torch.isfinite(scores).all() & torch.isfinite(target[weight]).all()):
            raise CalibrationError(
                f"layer {path!r} has non-finite scores or outputs under softmax; check the checkpoint"
            )
        yield Rows(
            query=query,
            value=value,
            target=target.masked_fill(~weight.unsqueeze(-1), 0.0),
            scores=scores.masked_fill(~seen, 0.0),
            visible=seen.float(),
            count=count.clamp(min=1).float(),
            weight=weight.float(),
            scaling=observation.scaling,
        )
