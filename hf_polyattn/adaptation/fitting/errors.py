"""How far the outputs of candidate polynomials are from softmax's."""

from __future__ import annotations

import torch
from torch import Tensor

from ...patching.row_shift import evaluate
from ...spec import PolyAttentionConfig, Polynomial
from .interval import Intervals
from .normal_equations import candidates_at_once, of_heads
from .rows import Rows


class Target:
    """Softmax's outputs o_i, summed: what candidates are to reproduce.

    Attributes:
        square: Σ‖o_i‖², (H,).
    """

    def __init__(self, like: Tensor) -> None:
        self.square = like.new_zeros(like.shape[1])
        self._sum = like.new_zeros(like.shape[1], 1)
        self._count = 0.0

    def see(self, rows: Rows) -> Tensor:
        """Adds rows and returns their outputs in float64, (b, H, Tq, Dv)."""
        target = rows.target.double()
        self._count += float(rows.weight[:, 0].sum())
        self._sum = self._sum + target.sum((0, 2))
        self.square += target.square().sum((0, 2, 3))
        return target

    def variance(self) -> Tensor:
        """Returns Σ‖o_i − their mean‖², (H,)."""
        return (self.square - self._sum.square().sum(-1) / self._count).clamp(min=1e-30)


class MeasuredErrors:
    """The errors of candidates as the operator runs them.

    Args:
        spec: of the polynomials.
        intervals: that they are on.
        coefficients: (C, H, K).

    Attributes:
        target: softmax's outputs.
        product: Σ out_i·o_i, (C, H).
        output_square: Σ‖out_i‖², (C, H).
    """

    def __init__(self, spec: Polynomial, intervals: Intervals, coefficients: Tensor) -> None:
        self.spec, self.intervals, self.coefficients = spec, intervals, coefficients
        self.target = Target(intervals.tops)
        self.product = torch.zeros_like(intervals.tops)
        self.output_square = torch.zeros_like(intervals.tops)

    def see(self, rows: Rows, shifted: Tensor) -> None:
        """Adds rows."""
        target, groups = rows.grouped(self.target.see(rows)).flatten(4).unsqueeze(-1), rows.value.shape[1]
        weight, value = rows.grouped(rows.weight).float(), rows.value.flatten(0, 1).float()
        shifted = shifted.float()  # as the operator has them
        visible = rows.grouped(rows.visible).float()
        for candidates in candidates_at_once(len(self.intervals), 2 * shifted.numel()):
            t = self.intervals.grouped_arguments(shifted, candidates, groups)
            c = self.coefficients[candidates]
            c = c.reshape(len(c), groups, -1, c.shape[-1]).transpose(0, 1)[..., None, None, :]
            w = evaluate(self.spec, c, t).mul_(visible)
            if self.spec.normalizer == "l1":
                scale = 1.0 / w.abs().sum(-1).clamp(min=1e-37)
            else:
                scale = rows.grouped(rows.fixed_scale(self.spec.normalizer)).float()
            out = (w.flatten(0, 1).flatten(1, 3) @ value).reshape(*w.shape[:-1], -1)
            out = out.mul_((scale * weight).unsqueeze(-1)).double().flatten(4)
            self.product[candidates] += of_heads((out.unsqueeze(-2) @ target)[..., 0, 0])
            self.output_square[candidates] += of_heads(out.square().sum(-1))

    def errors(self) -> Tensor:
        """Returns Σ‖out_i − o_i‖², (C, H)."""
        return squared_error(self.output_square, self.product, self.target.square)


def squared_error(output_square: Tensor, product: Tensor, target_square: Tensor) -> Tensor:
    """Returns Σ‖out − o‖² of the sums of its terms; infinite where that is no number."""
    return (output_square - 2.0 * product + target_square).nan_to_num(nan=torch.inf)


def comparable(errors: Tensor, config: PolyAttentionConfig) -> Tensor:
    """Returns the errors by which heads choose, (C, H): their own, or those of the layer if it has one polynomial."""
    return errors if config.granularity == "head" else errors.sum(1, keepdim=True).expand_as(errors)
