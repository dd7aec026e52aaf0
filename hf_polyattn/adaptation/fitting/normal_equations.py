"""The sums over all rows that coefficients are solved from."""

from __future__ import annotations

import torch
from torch import Tensor

from ...spec import PolyAttentionConfig
from .interval import Intervals
from .rows import Rows


class NormalEquations:
    """The sums that coefficients are solved from: Σ g_i g_iᵀ, (C, H, K, K), and a linear term, (C, H, K)."""

    def __init__(self, config: PolyAttentionConfig, intervals: Intervals) -> None:
        self.config, self.intervals = config, intervals
        size, zeros = config.spec.degree + 1, intervals.tops.new_zeros
        self.matrix = zeros(*intervals.tops.shape, size, size)
        self.linear = zeros(*intervals.tops.shape, size)

    def features(self, rows: Rows, shifted: Tensor, candidate: int) -> tuple[Tensor, Tensor]:
        """Returns F_k, (K, b, H, Tq, Dv), and S_k = Σ_j m_ij t_ij^k, (K, b, H, Tq)."""
        t = self.intervals.arguments(shifted, candidate)
        power, features, sums = rows.visible.expand_as(t).clone(), [], []
        for k in range(self.config.spec.degree + 1):
            if k:
                power.mul_(t)
            features.append(rows.apply(power))
            sums.append(power.sum(-1))
        return torch.stack(features), torch.stack(sums)

    def add(self, candidate: int, features: Tensor, linear: Tensor | None = None, target: Tensor | None = None) -> None:
        """Adds rows of g, (K, b, H, Tq, Dv), and their part of the linear term.

        Args:
            candidate: whose equations.
            features: g.
            linear: (H, K); None for the products of g and a target.
            target: (b, H, Tq, Dv), float64.
        """
        g = features.permute(2, 0, 1, 3, 4).flatten(2).double()  # (H, K, rows)
        self.matrix[candidate] += g @ g.transpose(1, 2)
        if linear is None:
            assert target is not None
            linear = (g @ target.transpose(0, 1).flatten(1).unsqueeze(-1)).squeeze(-1)
        self.linear[candidate] += linear

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Returns the sums by which heads are solved: their own, or those of the layer if it has one polynomial."""
        if self.config.granularity == "head":
            return self.matrix, self.linear
        summed = (tensor.sum(1, keepdim=True).expand_as(tensor) for tensor in (self.matrix, self.linear))
        return next(summed), next(summed)
