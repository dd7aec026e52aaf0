"""What an attention module has beside queries, keys and values, as kernels of whole modules take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

#: The features of a row shift that are not squares of queries.
FEATURES = ("m", "v", "m²", "m v", "v²", "v³", "log n", "1/n")
#: Coefficients of a refinement's step, and the row sums between which it looks at them.
STEPS = 5
ROW_SUMS = (0.2, 5.0)

#: The tensors of a polynomial, of the moments of a row shift and of a refinement, in the order of `csrc/layer.cpp`.
POLYNOMIAL = ("coefficients", "delta", "directions", "center", "radius")
MOMENTS = ("weights", "means", "scales", "length_shift", "squares", "lengths")
REFINEMENT = (*POLYNOMIAL, "steps")
#: Of a row shift.
SHIFT = ("key_shift", *MOMENTS)


class ModuleTensors(NamedTuple):
    """The tensors of a call of a module.

    Attributes:
        query: (B, H, Tq, D).
        key: (B, G, Tk, D).
        value: (B, G, Tk, Dv).
        polynomial: the tensors of POLYNOMIAL.
        shift: nothing; the key shift (H, D); or that and the tensors of MOMENTS.
        refinements: the tensors of REFINEMENT, of one after the other.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    polynomial: Sequence[Tensor]
    shift: Sequence[Tensor]
    refinements: Sequence[Tensor]


def changed_coefficients(coefficients: Tensor, delta: Tensor, directions: Tensor) -> Tensor:
    """Returns c + δA, (H, P + 1) or (1, P + 1): c to the bit where δ is 0."""
    # no matrix product, which autocast and TF32 would round
    return coefficients + (delta.unsqueeze(-1) * directions).sum(-2)
