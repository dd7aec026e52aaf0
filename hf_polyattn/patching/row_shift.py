"""What moves the scores of a row to the interval of its head's polynomial, beyond a center and a key shift.

    s_i = c + scaling · q_i·μ                                                         linear
        + (1 − α) log n_i + m_i + v_i / 2                                             the prior of the moments
        + (log n̂_i − log n̄) scaling · q_i·ν + Σ_f w_f (φ_f(i) − mean_f) / scale_f      and what calibration adds to it

with m_i and v_i the mean and variance of the row's visible scores, n_i their number, n̂_i that number held within the
lengths of the calibration, r_i = n_i^(−α) the fixed normalizer (α = 0 for l1), and the features
φ = m, v, m², m v, v², v³, log n̂, 1/n̂ and (u_r·q)². No exponential, no division by what data decide.

Source: DESIGN.md, "The row shift".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.call import ROW_EXPONENTS
from ..ops.centers import MomentWeights
from ..ops.module import FEATURES, ROW_SUMS, STEPS
from ..spec import PolyAttentionConfig, Polynomial
from .relative import RelativePolynomial, fixed

_LOG_N = FEATURES.index("log n")
#: Squares of queries that `calibrate` tries.
SQUARES = 8


def features(query: Tensor, mean: Tensor, variance: Tensor, count: Tensor, squares: Tensor | None) -> Tensor:
    """Returns φ of each row.

    Args:
        query: (B, H, Tq, D), float32.
        mean, variance: of the row's scores, (B, H, Tq).
        count: n̂_i, broadcastable to them.
        squares: u, (H, R, D), or None.

    Returns:
        (B, H, Tq, 8 + R).
    """
    count = count.to(mean.dtype).expand_as(mean)
    listed = [mean, variance, mean * mean, mean * variance, variance**2, variance**3, count.log(), 1.0 / count]
    found = torch.stack(listed, -1)
    if squares is None or squares.shape[1] == 0:
        return found
    # copied, so that the product does not depend on where a loaded tensor happens to lie in memory
    return torch.cat([found, (query @ squares.transpose(-1, -2).contiguous()).square()], -1)


def prior(mean: Tensor, variance: Tensor, count: Tensor, alpha: float) -> Tensor:
    """Returns what the first two cumulants say of s_i, (B, H, Tq)."""
    return mean + variance / 2.0 + (1.0 - alpha) * count.to(mean.dtype).log()


def alpha_of(normalizer: str) -> float:
    """Returns α of r_i = n_i^(−α); 0 for l1, whose row sum is no power of n."""
    return -ROW_EXPONENTS.get(normalizer, 0.0)


class MomentShift(nn.Module):
    """What the moments and the length of a row add to the linear shift; before calibration the prior alone.

    Attributes:
        weights: Parameter (H, 8 + R), nats for one standard deviation of a feature.
        length_shift: Parameter (H, D), ν.
        squares: Parameter (H, R, D), u.
        means, scales: Parameters (H, 8 + R) without gradient, of the features on the calibration rows.
        lengths: Parameter (2,) without gradient, the fewest and the most keys that a calibration row saw.
    """

    _is_hf_initialized: bool = True

    def __init__(self, heads: int, head_dim: int, squares: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        count = len(FEATURES) + squares
        self.weights = nn.Parameter(torch.empty(heads, count, **options))
        self.length_shift = nn.Parameter(torch.empty(heads, head_dim, **options))
        self.squares = nn.Parameter(torch.empty(heads, squares, head_dim, **options))
        self.means, self.scales, self.lengths = (  # no buffers, which Accelerate does not offload
            nn.Parameter(torch.empty(shape, **options), requires_grad=False)
            for shape in ((heads, count), (heads, count), (2,))
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Leaves the prior alone, for any length."""
        for tensor in (self.weights, self.length_shift, self.squares, self.means):
            tensor.zero_()
        self.scales.fill_(1.0)
        self.lengths.copy_(torch.tensor([1.0, 1e9]))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters that can have gradients."""
        return self.weights, self.length_shift, self.squares

    def weighed(self, alpha: float) -> MomentWeights:
        """Returns what `forward` weighs by, as the fused kernel takes it."""
        weights = self.weights / fixed(self.scales)
        fewest, most = self.lengths.tolist()
        return MomentWeights(weights, self.means, self.length_shift, self.squares, (fewest, most), alpha)

    def forward(self, query: Tensor, mean: Tensor, variance: Tensor, count: Tensor, alpha: float) -> Tensor:
        """Returns what is added to the linear shift, (B, H, Tq); `query` comes scaled, in the dtype of the moments."""
        dtype = mean.dtype
        means, scales, lengths = fixed(self.means), fixed(self.scales), fixed(self.lengths)
        known = count.to(dtype).clamp(lengths[0], lengths[1])
        standard = features(query, mean, variance, known, self.squares.to(dtype)) - means.to(dtype)[:, None]
        learned = (standard * (self.weights / scales).to(dtype)[:, None]).sum(-1)
        by_length = torch.linalg.vecdot(query, self.length_shift.to(dtype)[:, None])
        away = known.log() - means[:, None, _LOG_N].to(dtype)
        shift: Tensor = prior(mean, variance, count, alpha) + learned + away * by_length
        return shift


class Refinement(RelativePolynomial):
    """One look at the polynomial's own row sum at the predicted shift: s_i ← s_i + g(S_i).

    S_i = r_i Σ_j p(t_ij) is nearly exp of what the prediction left of s_i, and g is a polynomial of degree 4 in
    S_i − 1, where S_i is held within ROW_SUMS.

    Attributes:
        coefficients, delta, directions: Parameters, of a `RelativePolynomial`: the polynomial that is summed.
        center: Parameter (H,) without gradient, of its interval, from the center of the attention's own.
        radius: Parameter (H,) without gradient, of its interval.
        steps: Parameter (H, 5), of g, ascending powers.
    """

    _is_hf_initialized: bool = True

    def __init__(self, rows: int, heads: int, degree: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.make_polynomials(rows, degree, **options)
        self.steps = nn.Parameter(torch.empty(heads, STEPS, **options))
        self.center, self.radius = (nn.Parameter(torch.empty(heads, **options), requires_grad=False) for _ in range(2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Takes no step."""
        self.coefficients.zero_()
        self.coefficients[:, 0] = 1.0
        self.directions.copy_(torch.eye(self.coefficients.shape[1]))
        for tensor in (self.delta, self.steps, self.center):
            tensor.zero_()
        self.radius.fill_(1.0)

    def step(self, row_sum: Tensor) -> Tensor:
        """Returns g(S), (B, H, Tq)."""
        return step(row_sum, self.steps)


def step(row_sum: Tensor, steps: Tensor) -> Tensor:
    """Returns g(S) of row sums (B, H, Tq) by the coefficients (H, 5)."""
    z = row_sum.clamp(*ROW_SUMS) - 1.0
    c = steps.to(z.dtype)[:, None]
    g = c[..., -1].expand_as(z)
    for power in range(STEPS - 2, -1, -1):
        g = g * z + c[..., power]
    return g


def evaluate(spec: Polynomial, coefficients: Tensor, t: Tensor) -> Tensor:
    """Returns p(t)^s in the dtype of t, by coefficients (…, P + 1) that broadcast to it."""
    c = coefficients.to(t.dtype)
    w = c[..., -1].expand_as(t)
    for k in range(c.shape[-1] - 2, -1, -1):
        w = torch.addcmul(c[..., k], w, t)
    for _ in range(spec.power.bit_length() - 1):
        w = w * w
    return w


def shift_modules(config: PolyAttentionConfig, rows: int, heads: int, head_dim: int, device: Any) -> dict[str, Any]:
    """Returns the child modules that a config asks a `PolyAttention` for, by name."""
    found: dict[str, Any] = {}
    if config.row_shift == "moments":
        found["moments"] = MomentShift(heads, head_dim, config.squares, device)
    if config.spec.refinements:
        count, degree = config.spec.refinements, config.spec.degree
        found["refinements"] = nn.ModuleList(Refinement(rows, heads, degree, device) for _ in range(count))
    return found
