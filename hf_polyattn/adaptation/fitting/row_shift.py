"""The row shift s_i: where the scores of a row have to be moved so that one polynomial is exp on all rows of a head.

softmax_ij = exp(x_ij − lse_i) = r_i · exp(x_ij − s_i) with s_i = lse_i − α log n_i, for the fixed r_i = n_i^(−α). The
polynomial cannot have lse_i, so s_i is predicted from what it can have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...patching.core import PolyAttention
from .rows import Rows
from .solves import quadratic, solve

ALPHA = {"rsqrt": 0.5, "mean": 1.0, "none": 0.0, "l1": 0.0}


class RowShift:
    """A linear prediction of s_i for each head: c_h + scaling · q_i·μ_h, with the key shift μ_h.

    Args:
        heads: H.
        head_dim: D, of the queries.
        alpha: of the normalizer, see `ALPHA`.
        key_shift: whether μ_h is fitted; it is 0 otherwise.
        device: of the sums.

    Attributes:
        count: rows that were seen.
        residual: standard deviation of what the prediction leaves of s_i, nats, (H,); once solved.
    """

    def __init__(self, heads: int, head_dim: int, alpha: float, *, key_shift: bool, device: torch.device) -> None:
        self.alpha, self.key_shift = alpha, key_shift
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.count = 0.0
        self._gram = torch.zeros(heads, head_dim + 1, head_dim + 1, **options)
        self._moment = torch.zeros(heads, head_dim + 1, **options)
        self._square = torch.zeros(heads, **options)

    def see(self, rows: Rows) -> None:
        """Adds rows to the regression of s_i on the features."""
        y = (rows.log_partition_sums() - self.alpha * rows.count.log()).double() * rows.weight
        x = _features(rows).double() * rows.weight.unsqueeze(-1)
        self._gram += torch.einsum("bhti,bhtj->hij", x, x)
        self._moment += torch.einsum("bhti,bht->hi", x, y)
        self._square += y.square().sum((0, 2))
        self.count += float(rows.weight[:, 0].sum())

    def solve(self) -> None:
        """Solves the regression; it needs two rows."""
        if self.key_shift:
            self._solution = solve(self._gram, self._moment, ridge=1e-6)  # (H, D + 1)
        else:
            self._solution = torch.zeros_like(self._moment)
            self._solution[:, -1] = self._moment[:, -1] / self.count
        explained = 2.0 * (self._solution * self._moment).sum(-1) - quadratic(self._solution, self._gram)
        self.residual = ((self._square - explained) / self.count).clamp(min=0.0).sqrt()

    def of(self, rows: Rows) -> Tensor:
        """Returns the predicted s_i, (b, H, Tq)."""
        linear, constant = self._solution[:, :-1, None].float(), self._solution[:, -1, None].float()
        return rows.scaling * (rows.query @ linear).squeeze(-1) + constant

    def write(self, child: PolyAttention, top: Tensor, radius: Tensor) -> None:
        """Gives a module this shift: its intervals become s_i + [top − 2 · radius, top]; both are (H,)."""
        child.center.copy_(self._solution[:, -1] + top - radius)
        child.key_shift.copy_(self._solution[:, :-1])


def _features(rows: Rows) -> Tensor:
    """Returns what s_i is predicted from, (b, H, Tq, D + 1)."""
    return torch.cat([rows.query * rows.scaling, torch.ones_like(rows.query[..., :1])], -1)
