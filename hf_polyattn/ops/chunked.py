"""Backend `chunked`: plain PyTorch in blocks of query rows, forward and backward, any device and float dtype.

A block holds a few batch entries and query rows against all the keys that they may see; nothing of the
size Tq × Tk outlives it, and backward computes it again. Computes in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .call import Call
from .dropout import dropout_scale, row_numbers
from .masks import band, key_range

EPSILON = 1e-37

# Scores in one block. On a CPU its few float32 temporaries should stay in the last-level cache; another
# device wants enough of them to be filled.
_BLOCK_SCORES_CPU = 2**19
_BLOCK_SCORES = 2**25


def forward(call: Call) -> Tensor:
    """Returns the output (B, Tq, H, Dv), contiguous, in the query's dtype."""
    batch, heads, q_len, _ = call.query.shape
    out = call.query.new_zeros((batch, q_len, heads, call.value.shape[3]))
    with torch.autocast(device_type=call.query.device.type, enabled=False):
        for block in _blocks(call):
            t = block.scores()
            if call.clamp:
                t.clamp_(-1.0, 1.0)
            w = _horner(t, call.coefficients)
            for _ in range(call.power.bit_length() - 1):
                w.mul_(w)
            weights = block.hide(w).mul_(block.row_scale(w))
            if call.seed is not None:
                weights.mul_(block.dropout_scale())
            rows = block.ungroup(block.group(weights) @ block.value())
            out[block.entries, block.rows] = rows.transpose(1, 2)
    return out


def backward(grad_output: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key, value, coefficients and center (shape (0,) if there is none).

    With g_ij = dO_i·v_j and D_ij = r_i m_ij (g_ij − [l1] (Σ_j g_ij r_i w_ij) sign w_ij), the gradient of w:
    dp = D · s p^(s−1), dV = (r w)ᵀ dO, dc_k = Σ dp t^k, dt = dp · p'(t) (0 where clamped),
    dcenter = −Σ_j dt / radius, dS = dt · scaling / radius, dQ = dS K, dK = dSᵀ Q.
    """
    dtype, device = call.compute_dtype, call.query.device
    grad_query = torch.zeros(call.query.shape, dtype=call.query.dtype, device=device)
    grad_key = torch.zeros(call.key.shape, dtype=dtype, device=device)
    grad_value = torch.zeros(call.value.shape, dtype=dtype, device=device)
    grad_coefficients = torch.zeros(call.coefficients.shape, dtype=dtype, device=device)
    grad_center = torch.zeros((0,) if call.center is None else call.center.shape, dtype=dtype, device=device)

    with torch.autocast(device_type=device.type, enabled=False):
        for block in _blocks(call):
            t = block.scores()
            inside = None
            if call.clamp:
                inside = t.abs() <= 1.0
                t.clamp_(-1.0, 1.0)
            p = _horner(t, call.coefficients)
            w, slope = p, None  # slope = dw/dp = s p^(s−1), a product of the squares
            for _ in range(call.power.bit_length() - 1):
                slope = 2.0 * w if slope is None else slope * w * 2.0
                w = w * w
            w = block.hide(w)
            row_scale = block.row_scale(w)
            weights = dropped = w * row_scale

            grad_rows = block.group(grad_output[block.entries, block.rows].transpose(1, 2).to(dtype))
            grad_weights = block.ungroup(grad_rows @ block.value().transpose(-1, -2))
            if call.seed is not None:
                keep = block.dropout_scale()
                dropped = weights * keep
                grad_weights.mul_(keep)
            grad_value[block.entries, :, block.columns] += block.group(dropped).transpose(-1, -2) @ grad_rows

            if call.normalizer == "l1":
                grad_weights = grad_weights - (grad_weights * weights).sum(-1, keepdim=True) * w.sign()
            grad_p = block.hide(grad_weights * row_scale)
            if slope is not None:
                grad_p.mul_(slope)
            grad_coefficients += _moments(grad_p, t, grad_coefficients.shape[1])

            grad_t = grad_p * _horner(t, _derivative(call.coefficients))
            if inside is not None:
                grad_t.mul_(inside)
            if call.radius is not None:
                grad_t.div_(call.radius.to(dtype)[:, None, None])
            if call.center is not None:
                grad_center[block.entries, :, block.rows] = -grad_t.sum(-1)
            grad_scores = block.group(grad_t.mul_(call.scaling))
            grad_query[block.entries, :, block.rows] = block.ungroup(grad_scores @ block.key()).to(grad_query.dtype)
            grad_key[block.entries, :, block.columns] += grad_scores.transpose(-1, -2) @ block.query()

    return (
        grad_query,
        grad_key.to(call.key.dtype),
        grad_value.to(call.value.dtype),
        grad_coefficients.to(call.coefficients.dtype),
        grad_center if call.center is None else grad_center.to(call.center.dtype),
    )


@dataclass(frozen=True, slots=True)
class _Block:
    """Batch entries × query rows × key columns of a call. Its tensors are (b, H, i, j), in the compute dtype."""

    call: Call
    entries: slice
    rows: slice
    columns: slice
    visible: Tensor | None

    def query(self) -> Tensor:
        """(b, G, R·i, D): the query heads that share a key head become more rows."""
        return self.group(self.call.query[self.entries, :, self.rows].to(self.call.compute_dtype))

    def key(self) -> Tensor:
        return self.call.key[self.entries, :, self.columns].to(self.call.compute_dtype)

    def value(self) -> Tensor:
        return self.call.value[self.entries, :, self.columns].to(self.call.compute_dtype)

    def group(self, rows: Tensor) -> Tensor:
        """(b, H, i, ·) → (b, G, R·i, ·)."""
        group_rows = rows.shape[1] // self.call.key.shape[1] * rows.shape[2]
        return rows.reshape(rows.shape[0], self.call.key.shape[1], group_rows, rows.shape[3])

    def ungroup(self, rows: Tensor) -> Tensor:
        """(b, G, R·i, ·) → (b, H, i, ·)."""
        heads = self.call.query.shape[1]
        return rows.reshape(rows.shape[0], heads, self.rows.stop - self.rows.start, rows.shape[3])

    def scores(self) -> Tensor:
        """Returns t before the clamp."""
        call = self.call
        t = self.ungroup(self.query() @ self.key().transpose(-1, -2)).mul_(call.scaling)
        if call.center is not None:
            t.sub_(call.center[self.entries, :, self.rows].unsqueeze(-1))
        if call.radius is not None:
            t.div_(call.radius.to(t.dtype)[:, None, None])
        return t

    def hide(self, w: Tensor) -> Tensor:
        """Zeroes, in place, what a row may not see."""
        return w if self.visible is None else w.masked_fill_(~self.visible, 0.0)

    def row_scale(self, w: Tensor) -> Tensor:
        """Returns r_i, broadcastable to (b, H, i, 1)."""
        if self.call.normalizer == "none":
            return w.new_ones(())
        if self.call.normalizer == "l1":
            return 1.0 / (EPSILON + w.abs().sum(-1, keepdim=True))
        if self.visible is None:
            n = w.new_full((), max(1, w.shape[3]))
        else:
            n = self.visible.sum(-1, keepdim=True).clamp(min=1).to(w.dtype)
        return n.rsqrt() if self.call.normalizer == "rsqrt" else 1.0 / n

    def dropout_scale(self) -> Tensor:
        call = self.call
        assert call.seed is not None
        heads, q_len, device = call.query.shape[1], call.query.shape[2], call.query.device
        entries = range(self.entries.start, self.entries.stop)
        numbers = row_numbers(entries, heads, range(self.rows.start, self.rows.stop), q_len, device)
        columns = torch.arange(self.columns.start, self.columns.stop, device=device)
        return dropout_scale(call.seed, numbers, columns, call.dropout)


def _blocks(call: Call) -> Iterator[_Block]:
    """Yields blocks that cover every query row that sees a key, each of about `_BLOCK_SCORES` scores at most."""
    batch, heads, q_len, _ = call.query.shape
    k_len = call.key.shape[2]
    if 0 in (batch, heads, q_len, k_len):
        return
    budget = _BLOCK_SCORES_CPU if call.query.device.type == "cpu" else _BLOCK_SCORES
    row_step = max(1, min(q_len, budget // (heads * k_len)))
    entry_step = max(1, min(batch, budget // (heads * k_len * row_step)))
    for row in range(0, q_len, row_step):
        queries = range(row, min(row + row_step, q_len))
        keys = key_range(queries, k_len, call.causal, call.window)
        if len(keys) == 0:
            continue
        pattern = band(queries, keys, call.causal, call.window, call.query.device)
        rows, columns = slice(queries.start, queries.stop), slice(keys.start, keys.stop)
        for entry in range(0, batch, entry_step):
            entries = slice(entry, min(entry + entry_step, batch))
            visible = pattern
            if call.mask is not None:
                mask = call.mask[entries if call.mask.shape[0] > 1 else slice(None), :, :, columns]
                mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
                visible = mask if pattern is None else mask & pattern
            yield _Block(call, entries, rows, columns, visible)


def _horner(t: Tensor, coefficients: Tensor) -> Tensor:
    """Returns Σ_k c_k t^k in a new tensor; coefficients (H, K), t (b, H, i, j)."""
    c = coefficients.to(t.dtype)[:, :, None, None]
    if c.shape[1] == 1:
        return c[:, 0].expand(t.shape).clone()
    p = torch.addcmul(c[:, -2], t, c[:, -1])
    for k in range(c.shape[1] - 3, -1, -1):
        p.mul_(t).add_(c[:, k])
    return p


def _derivative(coefficients: Tensor) -> Tensor:
    """Returns the coefficients of p'."""
    return coefficients[:, 1:] * torch.arange(1, coefficients.shape[1], device=coefficients.device)


def _moments(weights: Tensor, t: Tensor, count: int) -> Tensor:
    """Returns Σ weights · t^k over all but the heads, for k < count: (H, count)."""
    moments = [weights.sum((0, 2, 3))]
    for _ in range(count - 1):
        weights = weights * t
        moments.append(weights.sum((0, 2, 3)))
    return torch.stack(moments, dim=-1)
