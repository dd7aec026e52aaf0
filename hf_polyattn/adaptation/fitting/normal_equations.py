"""The sums over all rows that coefficients are solved from."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...spec import PolyAttentionConfig
from .interval import Intervals
from .rows import Rows

_POWERS = 2**20  # of t, for all candidates at once: what a core's cache holds, or nearly


class NormalEquations:
    """The sums that coefficients are solved from: Σ g_i g_iᵀ, (C, H, K, K), and a linear term, (C, H, K).

    Args:
        config: of the polynomial.
        intervals: that are tried.
        from_below: sum rows in powers of u = (1 + t) / 2, not of u = t. They are 0 where softmax is nil and the clamp
            acts: in float32 a sum of powers of t, 1 or −1 there, hides what is left of a polynomial that is nearly 0 on
            most keys.
    """

    def __init__(self, config: PolyAttentionConfig, intervals: Intervals, from_below: bool = False) -> None:
        self.config, self.intervals, self._from_below = config, intervals, from_below
        size, zeros = config.spec.degree + 1, intervals.tops.new_zeros
        self._matrix = zeros(*intervals.tops.shape, size, size)
        self._linear = zeros(*intervals.tops.shape, size)
        self._powers = (powers_of_t(size) if from_below else torch.eye(size)).to(intervals.tops)

    @property
    def matrix(self) -> Tensor:
        """The quadratic form of the coefficients of t^k."""
        return self._powers @ self._matrix @ self._powers.mT

    @property
    def linear(self) -> Tensor:
        """The linear term of the coefficients of t^k."""
        return self._linear @ self._powers.mT

    def of_u(self, coefficients: Tensor) -> Tensor:
        """Returns the coefficients of u^k of those of t^k, (..., K)."""
        return coefficients @ self._powers.to(coefficients)

    def parts(self, shifted: Tensor) -> Iterator[slice]:
        """Yields the candidates, as many at once as should be for so many scores."""
        yield from candidates_at_once(len(self.intervals), shifted.numel() * (self.config.spec.degree + 1))

    def features(self, rows: Rows, shifted: Tensor, candidates: slice) -> tuple[Tensor, Tensor]:
        """Returns F_k, (b, G, C, H / G, K, Tq, Dv), and S_k = Σ_j m_ij u_ij^k, (b, G, C, H / G, K, Tq)."""
        u = self.intervals.grouped_arguments(shifted, candidates, rows.value.shape[1])
        if self._from_below:
            u.add_(1.0).mul_(0.5)
        b, groups, count, heads, q_len, k_len = u.shape
        powers = u.new_empty(b, groups, count, heads, self.config.spec.degree + 1, q_len, k_len)
        powers[..., 0, :, :] = rows.grouped(rows.visible)
        for k in range(1, powers.shape[4]):
            torch.mul(powers[..., k - 1, :, :], u, out=powers[..., k, :, :])
        f = powers.flatten(0, 1).flatten(1, 4) @ rows.value.flatten(0, 1).to(u.dtype)
        return f.reshape(*powers.shape[:-1], -1), powers.sum(-1)

    def add(
        self, candidates: slice, features: Tensor, linear: Tensor | None = None, target: Tensor | None = None
    ) -> None:
        """Adds rows of g, (b, G, C, H / G, K, Tq, Dv), and their part of the linear term.

        Args:
            candidates: whose equations.
            features: g.
            linear: (b, G, C, H / G, K); None for the products of g and a target.
            target: (b, G, 1, H / G, Tq, Dv), float64.
        """
        g = features.double().flatten(5)
        self._matrix[candidates] += of_heads(g @ g.mT)
        if linear is None:
            assert target is not None
            linear = (g @ target.flatten(4).unsqueeze(-1)).squeeze(-1)
        self._linear[candidates] += of_heads(linear)

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Returns the sums by which heads are solved: their own, or those of the layer if it has one polynomial."""
        if self.config.granularity == "head":
            return self.matrix, self.linear
        summed = (tensor.sum(1, keepdim=True).expand_as(tensor) for tensor in (self.matrix, self.linear))
        return next(summed), next(summed)


def candidates_at_once(count: int, numbers: int) -> Iterator[slice]:
    """Yields the slices of `count` candidates, each of which takes so many numbers, that are computed together."""
    step = max(1, _POWERS // max(1, numbers))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def of_heads(summands: Tensor) -> Tensor:
    """Returns sums over batch entries: (b, G, C, H / G, …) → (C, H, …)."""
    return summands.sum(0).transpose(0, 1).flatten(1, 2)


def powers_of_t(count: int) -> Tensor:
    """Returns B of t^k = Σ_j B_kj u^j, u = (1 + t) / 2, (count, count), float64."""
    rows = [[math.comb(k, j) * 2.0**j * (-1.0) ** (k - j) for j in range(count)] for k in range(count)]
    return torch.tensor(rows, dtype=torch.float64)
