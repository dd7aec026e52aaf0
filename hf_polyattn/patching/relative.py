"""How a polynomial trains: in steps that are small beside what calibration made of it.

    p(t) = Σ_k (c_k + Σ_l δ_l A_lk) t^k

with the calibrated coefficients c, which no optimizer touches, the trained δ, 0 at first, and the directions A, a
Bernstein polynomial in each row: each rules one part of the interval. They are scaled so that no δ within [−ε, ε]
changes a weight p(t)^s of the interval by more than about ε of itself, or of the floor where the weight is less. So a
step of an optimizer that knows nothing of polynomials is as harmless as it is to the weights of the model. A step in
the coefficients themselves is none: an l1 polynomial falls by six orders of magnitude over its interval.

Source: DESIGN.md, section 4.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.module import changed_coefficients
from ..spec import PolyAttentionConfig, Polynomial

#: What tensors of changes are called; checkpoints of earlier versions lack all of them.
CHANGES = ("delta", "directions")

#: Of the largest |p(t)| of the interval: smaller values change as if they were so large. An l1 row may have all of its
#: keys at the low end; where nothing divides, what counts is the size beside the largest weights.
FLOORS = {"l1": 1e-6}
FLOOR = 1e-2
_NODES = 129  # of the interval, where p is looked at


class RelativePolynomial(nn.Module):
    """The polynomials of the heads of one attention module: what calibration made of them, and their change.

    Attributes:
        coefficients: Parameter c, (H, P + 1) or (1, P + 1), without gradient; ascending powers of t.
        delta: Parameter δ, of the same shape; what trains.
        directions: Parameter A, (H, P + 1, P + 1) or (1, P + 1, P + 1), without gradient.
    """

    coefficients: nn.Parameter
    delta: nn.Parameter
    directions: nn.Parameter

    def make_polynomials(self, rows: int, degree: int, **options: Any) -> None:
        """Makes the parameters, whose numbers are still to be set; the options are dtype and device."""
        count = degree + 1
        self.coefficients = nn.Parameter(torch.empty(rows, count, **options), requires_grad=False)
        self.delta = nn.Parameter(torch.empty(rows, count, **options))
        self.directions = nn.Parameter(torch.empty(rows, count, count, **options), requires_grad=False)

    @torch.no_grad()
    def set_coefficients(self, coefficients: Tensor, spec: Polynomial) -> None:
        """Takes the coefficients of a polynomial on an interval, (H, P + 1) or (1, P + 1), as those to train from."""
        self.coefficients.copy_(coefficients)
        self.delta.zero_()
        self.directions.copy_(relative_directions(self.coefficients, spec))

    def changed_coefficients(self) -> Tensor:
        """Returns the coefficients of p, c + δA, (H, P + 1) or (1, P + 1): c to the bit where δ is 0."""
        return changed_coefficients(fixed(self.coefficients), self.delta, fixed(self.directions))


def fixed(parameter: Tensor) -> Tensor:
    """Returns what calibration alone sets, without a gradient, though somebody may ask for one (`requires_grad_`)."""
    return parameter.detach() if parameter.requires_grad else parameter


def relative_directions(coefficients: Tensor, spec: Polynomial) -> Tensor:
    """Returns A of a polynomial on [−1, 1], (H, P + 1, P + 1), in the dtype of its coefficients (H, P + 1)."""
    count = coefficients.shape[-1]
    options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    t = torch.cos(torch.pi * torch.arange(_NODES, **options) / (_NODES - 1))
    powers = t ** torch.arange(count, **options)[:, None]  # (P + 1, nodes)
    bernstein = bernstein_polynomials(count - 1)
    size = (coefficients.detach().double().cpu() @ powers).abs()  # (H, nodes)
    largest = size.amax(-1, keepdim=True)
    size = torch.maximum(size, FLOORS.get(spec.normalizer, FLOOR) * largest)
    size = torch.where(largest > 0.0, size, 1.0)
    values = bernstein @ powers  # (P + 1, nodes), none negative
    most = (size[:, None] / values.clamp(min=1e-300)).amin(-1)  # (H, P + 1): alone, in units of B_l
    together = (most @ values / size).amax(-1, keepdim=True)
    scale = most / together / spec.power
    return (scale.unsqueeze(-1) * bernstein).to(coefficients)


def initial_directions(spec: Polynomial) -> Tensor:
    """Returns A of an uncalibrated polynomial, (P + 1, P + 1): powers of t, each by its coefficient, or by 1 for 0.

    A power of a Taylor polynomial is steep, and trains relative to that; a monomial as it stands.
    """
    sizes = [c / spec.power if c else 1.0 for c in spec.initial_coefficients()]
    return torch.diag(torch.tensor(sizes, dtype=torch.float64, device="cpu"))


def no_change(tensors: Mapping[str, Tensor], config: PolyAttentionConfig) -> dict[str, Tensor]:
    """Returns the tensors of changes that an earlier version did not save: none is changed.

    Args:
        tensors: of one polynomial, by their names in it.
        config: of the polynomial.

    Returns:
        By name; nothing if something of a change is there.
    """
    found: dict[str, Tensor] = {}
    if any(name.rpartition(".")[2] in CHANGES for name in tensors):
        return found
    for name, coefficients in tensors.items():
        part = name.removesuffix("coefficients")
        if part == name:
            continue
        spec = replace(config.spec, normalizer="none") if part else config.spec  # a refinement's divides by nothing
        if config.interval:
            directions = relative_directions(coefficients, spec)
        else:
            directions = initial_directions(spec).to(coefficients).repeat(len(coefficients), 1, 1)
        found |= {f"{part}delta": torch.zeros_like(coefficients), f"{part}directions": directions}
    return found


def warn_of_rounding(coefficients: Tensor, source: str) -> None:
    """Warns of coefficients that were cast to half precision with all of a checkpoint; whole numbers survive that."""
    if coefficients.dtype in (torch.bfloat16, torch.float16) and bool((coefficients != coefficients.round()).any()):
        warnings.warn(
            f"{source} has polynomials in {coefficients.dtype}: they are not those that were calibrated any more. Cast "
            "all tensors but those of polyattn, as save_pretrained does, or calibrate the model again.",
            stacklevel=2,
        )


def bernstein_polynomials(degree: int) -> Tensor:
    """Returns the coefficients of the Bernstein polynomials on [−1, 1], ascending powers, (P + 1, P + 1), float64."""
    rows = [
        [
            sum(
                math.comb(number, j) * math.comb(degree - number, k - j) * (-1) ** (k - j)
                for j in range(max(0, k - degree + number), min(number, k) + 1)
            )
            * math.comb(degree, number)
            / 2**degree
            for k in range(degree + 1)
        ]
        for number in range(degree + 1)
    ]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")
