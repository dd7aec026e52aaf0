"""What is solved in closed form, on plain matrices: linear and ratio problems, and a fit to exp."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

FLOOR = 1e-6  # of the largest value of p on the interval, below which an l1 polynomial may not fall


def quadratic(vector: Tensor, matrix: Tensor) -> Tensor:
    """Returns v'Av: (..., n), (..., n, n) → (...)."""
    return torch.einsum("...i,...ij,...j->...", vector, matrix, vector)


def exponential_fit(degree: int, width: float, below: float = 0.0) -> Tensor:
    """Returns the coefficients of p(t) ≈ exp(u), u = (t − 1) · width / 2 on [−1, 1], in relative error.

    Least squares at Chebyshev nodes of p(t)/exp(u) − 1; (degree + 1,), float64, p(1) about 1. Where scores lie as far
    as `below`, in the units of u, under the interval, |p| is to stay below exp(−width) there, by a growing penalty.
    """
    nodes = torch.cos(torch.pi * (torch.arange(64, dtype=torch.float64) + 0.5) / 64)
    powers = nodes[:, None] ** torch.arange(degree + 1)
    scaled, ones = powers * torch.exp(-(nodes[:, None] - 1.0) * width / 2.0), torch.ones(64, 1, dtype=torch.float64)
    solution: Tensor = torch.linalg.lstsq(scaled, ones).solution[:, 0]
    if below <= 0.0:
        return solution
    lower = -1.0 - (1.0 - nodes) * below / width
    limited = lower[:, None] ** torch.arange(degree + 1) * math.exp(width)  # ≤ 1 where the bound holds
    for weight in torch.logspace(-4, 4, 17, dtype=torch.float64):
        if (limited @ solution).abs().max() <= 1.0:
            break
        both = torch.cat([scaled, weight * limited]), torch.cat([ones, torch.zeros_like(ones)])
        solution = torch.linalg.lstsq(*both).solution[:, 0]
    return solution


class Factored:
    """Symmetric positive semi-definite matrices (..., n, n), rank-deficient ones too, to solve with several ridges."""

    def __init__(self, matrix: Tensor) -> None:
        self._scale = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=1e-300).rsqrt()
        scaled = matrix * self._scale.unsqueeze(-1) * self._scale.unsqueeze(-2)
        self._values, self._vectors = torch.linalg.eigh(scaled)

    def solve(self, vector: Tensor, ridge: float = 1e-12) -> Tensor:
        """Returns the solution, (..., n); `ridge` is on the matrices with a diagonal of 1."""
        scale, values, vectors = self._scale, self._values, self._vectors
        inverse = 1.0 / (values + ridge) * (values > 1e-13 * values[..., -1:])
        rotated = (vectors.transpose(-1, -2) @ (vector * scale).unsqueeze(-1)).squeeze(-1)
        solution: Tensor = scale * (vectors @ (inverse * rotated).unsqueeze(-1)).squeeze(-1)
        return solution


def solve(matrix: Tensor, vector: Tensor, ridge: float = 1e-12) -> Tensor:
    """Solves symmetric positive semi-definite systems (..., n, n) x = (..., n), rank-deficient ones too."""
    return Factored(matrix).solve(vector, ridge)


def solve_ratio(matrix: Tensor, vector: Tensor) -> Tensor:
    """Minimises c'Ac subject to b'c = 1 and p(t) ≥ FLOOR · max p on [−1, 1]: (..., K, K), (..., K) → (..., K).

    The bound is met by a growing quadratic penalty on the Chebyshev nodes that violate it: where p touches
    zero so may a row sum, and the gradient of a ratio is then infinite.
    """
    count = vector.shape[-1]
    a, b = matrix.reshape(-1, count, count).cpu().numpy(), vector.reshape(-1, count).cpu().numpy()
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    powers = nodes[:, None] ** np.arange(count)  # (64, K)
    squares = (powers[:, :, None] * powers[:, None, :]).reshape(64, -1)
    a = a / np.maximum(np.trace(a, axis1=1, axis2=2), 1e-300)[:, None, None] + 1e-12 * np.eye(count)
    penalty, floor = np.zeros((len(a), 64)), np.zeros((len(a), 1))
    for _ in range(30):
        bounded = a + (penalty @ squares).reshape(a.shape)
        solved = np.linalg.solve(bounded, np.stack([(penalty * floor) @ powers, b], -1))
        pulled, free = solved[..., 0], solved[..., 1]
        multiplier = (1.0 - (b * pulled).sum(-1)) / (b * free).sum(-1)
        c = pulled + free * multiplier[:, None]
        values = c @ powers.T
        floor = FLOOR * values.max(-1, keepdims=True)
        violated = values < 0.5 * floor
        if not violated.any():
            break
        penalty = np.where(violated, np.maximum(penalty * 8.0, 1e-6), penalty)
    return torch.from_numpy(c).reshape(vector.shape).to(vector.device)
