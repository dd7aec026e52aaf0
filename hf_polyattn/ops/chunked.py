"""Backend `chunked`: plain PyTorch in blocks of the weights, forward and backward, any device and float dtype.

A block holds query rows of some heads and batch entries against all the keys that the rows may see; nothing
of the size Tq × Tk outlives it, and backward computes it again. Computes in float32 (float64 for float64
inputs). Factors of a whole row (scaling, radius, r_i) are applied to the D or Dv columns of the operands
instead of the Tk columns of the weights, and masks multiply: on a CPU, filling costs more than a matmul.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .call import EPSILON, ROW_EXPONENTS, Call, empty_gradient
from .dropout import dropout_scale
from .masks import key_slice, pattern

# Weights in one block. On a CPU its few float32 temporaries should stay in the last-level cache; another
# device wants enough of them to be filled.
_BLOCK_WEIGHTS_CPU = 2**19
_BLOCK_WEIGHTS = 2**25
# Query rows in one block of a causal or windowed call: the fewer they are, the fewer of the keys that none of
# them sees are computed.
_BAND_ROWS = 128


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Returns the output (B, Tq, H, Dv), contiguous, in the query's dtype, and the row scale as `library` says."""
    out, scales = call.zero_results()
    with torch.autocast(device_type=call.query.device.type, enabled=False):
        for block in _blocks(_fold(call)):
            w = block.hide(_horner(block.scores(), block.coefficients()))
            for _ in range(call.power.bit_length() - 1):
                w.mul_(w)
            row_scale = block.fixed_row_scale
            if call.normalizer == "l1":
                row_scale = _l1_row_scale(w)
                scales[block.entries, block.heads, block.rows] = row_scale[..., 0]
            if call.seed is not None:
                w.mul_(block.dropout_scale())
            rows = block.ungroup(block.group(w) @ block.value()) * row_scale
            out[block.entries, block.rows, block.heads] = rows.transpose(1, 2)
    return out, scales


def backward(
    grad_output: Tensor, output: Tensor, row_scale: Tensor, call: Call, *, coefficients_grad: bool, center_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key, value, coefficients and center (shape (0,) if there is none).

    With g_ij = r_i dO_i·v_j and, for l1, δ_i = r_i Σ_j g_ij w_ij (else 0), the gradient of p is
    dp = m (g − δ sign w) s p^(s−1); then dV = wᵀ (r dO), dc_k = Σ dp t^k, dt = dp · p'(t) (0 where clamped),
    dcenter = −Σ_j dt / radius, dS = dt · scaling / radius, dQ = dS K, dK = dSᵀ Q. δ_i is r_i dO_i·O_i too, but the
    rounding of a bf16 output would show in the gradient of the coefficients, where much cancels.
    """
    with torch.autocast(device_type=call.query.device.type, enabled=False):
        folded = _fold(call)
        grad_query, grad_key, grad_value = (
            empty_gradient(operand, call.compute_dtype).zero_() for operand in (call.query, call.key, call.value)
        )
        grad_coefficients = torch.zeros_like(folded.coefficients)
        grad_center = grad_query.new_zeros(grad_query.shape[:3])
        for block in _blocks(folded):
            coefficients = block.coefficients()
            t = block.scores()
            w = block.hide(_horner(t, coefficients))
            slope = block.visible  # m s p^(s−1), a product of the squares
            if call.power > 1:
                slope = w * call.power
                w.mul_(w)
                for _ in range(call.power.bit_length() - 2):
                    slope.mul_(w)
                    w.mul_(w)

            scale = block.fixed_row_scale
            if call.normalizer == "l1":
                scale = row_scale[block.entries, block.heads, block.rows, None]
            grad_rows = grad_output[block.entries, block.rows, block.heads].transpose(1, 2).to(w.dtype) * scale
            grad_rows = block.group(grad_rows)
            grad_p = block.ungroup(grad_rows @ block.value().transpose(-1, -2))
            dropped = w
            if call.seed is not None:
                keep = block.dropout_scale()
                dropped = w * keep
                grad_p.mul_(keep)
            grad_value[block.entries, block.groups, block.columns] += block.group(dropped).transpose(-1, -2) @ grad_rows

            if call.normalizer == "l1":
                delta = (grad_p * w).sum(-1, keepdim=True) * scale
                grad_p.addcmul_(w.sign_(), delta, value=-1.0)
            if slope is not None:
                grad_p.mul_(slope)
            grad_t = _horner(t, _derivative(coefficients)).mul_(grad_p)
            if coefficients_grad:
                grad_coefficients[block.heads] += _moments(grad_p, t, coefficients.shape[1])
            if call.clamp:
                grad_t = torch.ops.aten.hardtanh_backward(grad_t, t, -1.0, 1.0)

            if center_grad:
                grad_center[block.entries, block.heads, block.rows] = grad_t.sum(-1)
            grad_t = block.group(grad_t)
            grad_query[block.entries, block.heads, block.rows] = block.ungroup(grad_t @ block.key())
            grad_key[block.entries, block.groups, block.columns] += grad_t.transpose(-1, -2) @ block.query()

        radius = _radius(call)
        grad_query *= call.scaling / radius
        if call.center is None:
            grad_center = call.coefficients.new_empty((0,))
        else:
            grad_center = (grad_center[..., None] / -radius)[..., 0].to(call.center.dtype)
    return (
        grad_query.to(call.query.dtype),
        grad_key.to(call.key.dtype),
        grad_value.to(call.value.dtype),
        grad_coefficients.to(call.coefficients.dtype),
        grad_center,
    )


@dataclass(frozen=True, slots=True)
class _Block:
    """Batch entries × query heads × query rows × key columns of a folded call: b × h × i × j weights.

    Attributes:
        heads, groups: h query heads and the g key/value heads that they share.
        visible: 1 where a row sees a key, else 0; broadcastable to (b, h, i, j), None where all is visible.
        fixed_row_scale: r_i of the normalizers that depend on the mask only; 1 for l1.
    """

    call: Call
    entries: slice
    heads: slice
    groups: slice
    rows: slice
    columns: slice
    visible: Tensor | None
    fixed_row_scale: Tensor | float

    def query(self) -> Tensor:
        """Returns (b, g, R·i, D)."""
        return self.group(self.call.query[self.entries, self.heads, self.rows])

    def key(self) -> Tensor:
        """Returns (b, g, j, D)."""
        return self.call.key[self.entries, self.groups, self.columns]

    def value(self) -> Tensor:
        """Returns (b, g, j, Dv)."""
        return self.call.value[self.entries, self.groups, self.columns]

    def coefficients(self) -> Tensor:
        """Returns (h, P + 1)."""
        return self.call.coefficients[self.heads]

    def group(self, rows: Tensor) -> Tensor:
        """(b, h, i, ·) → (b, g, R·i, ·): the query heads that share a key head become more rows."""
        groups = self.groups.stop - self.groups.start
        return rows.reshape(rows.shape[0], groups, rows.shape[1] // groups * rows.shape[2], rows.shape[3])

    def ungroup(self, rows: Tensor) -> Tensor:
        """(b, g, R·i, ·) → (b, h, i, ·)."""
        heads = self.heads.stop - self.heads.start
        return rows.reshape(rows.shape[0], heads, self.rows.stop - self.rows.start, rows.shape[3])

    def scores(self) -> Tensor:
        """Returns t."""
        t = self.ungroup(self.query() @ self.key().transpose(-1, -2))
        if self.call.center is not None:
            t.sub_(self.call.center[self.entries, self.heads, self.rows].unsqueeze(-1))
        if self.call.clamp:
            t.clamp_(-1.0, 1.0)
        return t

    def hide(self, block: Tensor) -> Tensor:
        """Zeroes, in place, what a row may not see."""
        return block if self.visible is None else block.mul_(self.visible)

    def dropout_scale(self) -> Tensor:
        """Returns (b, h, i, j): 0 where a weight is dropped, else 1 / (1 − probability)."""
        call, device = self.call, self.call.query.device
        assert call.seed is not None
        numbers = torch.arange(call.query[..., 0].numel(), device=device).view(call.query.shape[:3])
        columns = torch.arange(self.columns.start, self.columns.stop, device=device)
        return dropout_scale(call.seed, numbers[self.entries, self.heads, self.rows], columns, call.dropout)


def _radius(call: Call) -> Tensor | float:
    """Returns the radius in the compute dtype, (H, 1, 1)."""
    return 1.0 if call.radius is None else call.radius.to(call.compute_dtype)[:, None, None]


def _fold(call: Call) -> Call:
    """Returns the call in the compute dtype with scaling 1 and radius 1: query and center carry both."""
    dtype, radius = call.compute_dtype, _radius(call)
    return replace(
        call,
        query=call.query.to(dtype) * (call.scaling / radius),
        key=call.key.to(dtype),
        value=call.value.to(dtype),
        coefficients=call.coefficients.to(dtype),
        center=None if call.center is None else (call.center.to(dtype)[..., None] / radius)[..., 0],
        radius=None,
        scaling=1.0,
    )


def _blocks(call: Call) -> Iterator[_Block]:
    """Yields blocks that cover every query row that sees a key, each of a budget of weights or of one row."""
    batch, heads, q_len, _ = call.query.shape
    groups, k_len = call.key.shape[1:3]
    if 0 in (batch, heads, q_len, k_len):
        return
    repeats = heads // groups
    mask_per_head = call.mask is not None and call.mask.shape[1] > 1
    budget = (_BLOCK_WEIGHTS_CPU if call.query.device.type == "cpu" else _BLOCK_WEIGHTS) // (repeats * k_len)
    row_limit = q_len if call.window is None and not call.causal else _BAND_ROWS
    row_step = max(1, min(budget, row_limit, q_len))
    group_step = max(1, min(budget // row_step, groups))
    entry_step = max(1, min(budget // (row_step * group_step), batch))

    for rows in _steps(q_len, row_step):
        columns = key_slice(rows, k_len, call.causal, call.window)
        if columns.start == columns.stop:
            continue
        for entries in _steps(batch, entry_step):
            for part in _steps(groups, group_step):
                query_heads = slice(part.start * repeats, part.stop * repeats)
                if part.start == 0 or mask_per_head:
                    visible = _visible(call, entries, query_heads, rows, columns)
                    row_scale = _fixed_row_scale(call, visible)
                yield _Block(call, entries, query_heads, part, rows, columns, visible, row_scale)


def _steps(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _visible(call: Call, entries: slice, heads: slice, rows: slice, columns: slice) -> Tensor | None:
    visible = pattern(call, entries, heads, rows, columns)
    return None if visible is None else visible.to(call.compute_dtype)


def _l1_row_scale(w: Tensor) -> Tensor:
    """Returns r_i, (b, h, i, 1); 0 where all w are: dO / ε would overflow."""
    total = w.abs().sum(-1, keepdim=True)
    return torch.where(total > 0.0, 1.0 / (EPSILON + total), 0.0)


def _fixed_row_scale(call: Call, visible: Tensor | None) -> Tensor | float:
    if call.normalizer == "l1":
        return 1.0
    n = call.key.shape[2] if visible is None else visible.sum(-1, keepdim=True).clamp_(min=1.0)
    return n ** ROW_EXPONENTS[call.normalizer]


def _horner(t: Tensor, coefficients: Tensor) -> Tensor:
    """Returns Σ_k c_k t^k in a new tensor; t (b, h, i, j), coefficients (h, K)."""
    c = coefficients[:, :, None, None]
    if c.shape[1] == 1:
        return c[:, 0].expand(t.shape).clone()
    p = (t * c[:, -1]).add_(c[:, -2])
    for k in reversed(range(c.shape[1] - 2)):
        torch.addcmul(c[:, k], p, t, out=p)
    return p


def _derivative(coefficients: Tensor) -> Tensor:
    """Returns the coefficients of p'."""
    return coefficients[:, 1:] * torch.arange(1, coefficients.shape[1], device=coefficients.device)


def _moments(weights: Tensor, t: Tensor, count: int) -> Tensor:
    """Returns Σ weights · t^k over all but the heads, for k < count: (h, count). Overwrites the weights."""
    moments = [weights.sum((0, 2, 3))]
    moments += [weights.mul_(t).sum((0, 2, 3)) for _ in range(count - 1)]
    return torch.stack(moments, dim=-1)
