"""Attention of one sequence in JAX, for secret numbers: products and sums, and what an arm cannot do without.

Letters: T tokens, H heads, D head dim, C columns beside the keys, R forms of the query whose squares join the moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .owner import Plan

Array = Any
Secrets = Mapping[str, Array]
HIDDEN = -64.0  # nats; SPU's exp, (1 + x / 256)^256, is none below −256
ROW_SUMS = (0.2, 5.0)  # between which a refinement looks at its row sum


def attention(plan: Plan, secrets: Secrets, query: Array, key: Array, value: Array, visible: np.ndarray) -> Array:
    """Returns the output (T, H, D) of one sequence.

    Args:
        plan: public, of `owner`.
        secrets: of `owner`.
        query, key, value: (T, H, D), with the owner's factors in them.
        visible: public, (T, T), 1 for the keys that a row sees, else 0.
    """
    keys = key.transpose(1, 2, 0)
    if "columns" in secrets:
        keys = jnp.concatenate([keys, secrets["columns"]], 2)
    products = by_head(query, keys)
    scores, forms = products[..., : len(visible)], products[..., len(visible) :]
    if plan.kind == "softmax":
        weights, total = softmax_weights(scores, visible)
        return by_head(weights, value.transpose(1, 0, 2)) * (1.0 / total)[..., None]
    if plan.kind == "jax.nn.softmax":
        return by_head(jax.nn.softmax(lowered(scores, visible), -1), value.transpose(1, 0, 2))
    count = visible.sum(-1, dtype=np.float32)
    y = scores - row_shift(plan, secrets, scores, forms, visible, count)[..., None]
    for number in range(plan.refinements):
        part = {name.partition(".")[2]: x for name, x in secrets.items() if name.startswith(f"refinement{number}.")}
        y = y - refinement(plan, part, y, visible, count)[..., None]
    if plan.clamp:
        y = jnp.clip(y, -secrets["limit"][:, None], secrets["limit"][:, None])
    weights = polynomial(y, secrets["coefficients"], plan.monic)
    weights = weights if visible.all() else weights * visible[:, None]
    for _ in range(plan.power.bit_length() - 1):
        weights = weights * weights
    output = by_head(weights, value.transpose(1, 0, 2))
    if plan.row_sum:
        # Without |·|, which is a comparison: an l1 polynomial is positive on the scores of its calibration.
        return output * (1.0 / weights.sum(-1))[..., None]
    return output if plan.scaled else output * (count**-plan.alpha).astype(np.float32)[:, None, None]


def by_head(rows: Array, columns: Array) -> Array:
    """Returns the products of each head as one: (T, H, K), (H, K, N) → (T, H, N).

    The right factors stand on the diagonal of one matrix, with public zeros elsewhere: a secret product of matrices has
    a price of its own, in rounds and in time, and twelve of them twelve times that.
    """
    heads, inner, outer = columns.shape
    if heads == 1:
        return (rows[:, 0] @ columns[0])[:, None]
    diagonal = [jnp.pad(columns[h], ((0, 0), (h * outer, (heads - 1 - h) * outer))) for h in range(heads)]
    product = rows.reshape(len(rows), heads * inner) @ jnp.concatenate(diagonal, 0)
    return product.reshape(len(rows), heads, outer)


def softmax_weights(scores: Array, visible: np.ndarray) -> tuple[Array, Array]:
    """Returns exp(x − max) and its row sums: the output is divided once a row, not each weight."""
    scores = lowered(scores, visible)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return weights, weights.sum(-1)


def lowered(scores: Array, visible: np.ndarray) -> Array:
    """Returns the scores with `HIDDEN` added to those that a row does not see, whose exp is then 0 in fixed point."""
    return scores if visible.all() else scores + np.where(visible > 0.0, 0.0, HIDDEN).astype(np.float32)[:, None]


def row_shift(
    plan: Plan, secrets: Secrets, scores: Array, forms: Array, visible: np.ndarray, count: np.ndarray
) -> Array:
    """Returns center + s_i in radii, (T, H) or (H,); DESIGN.md, "The row shift".

    s_i = … + a₀ m + a₁ v + a₂ m² + Σ b (u·q)² + a₃ (m v) + (a₄ + a₅ v) v², the products of a line in one.
    """
    if "columns" not in secrets:
        return secrets["constant"]
    if not plan.moments:
        return secrets["constant"] + forms[..., 0]
    held = np.clip(count, *plan.lengths)
    seen = scores if visible.all() else scores * visible[:, None]
    # Products of independent numbers are one, each round being one whatever its size.
    shape = forms.shape[:2]
    by_length = [jnp.broadcast_to(secrets[name], shape) for name in ("log", "held_log", "held_inverse")]
    known = np.stack([1.0 / count, np.log(held), np.log(count), np.log(held), 1.0 / held], -1).astype(np.float32)
    scaled = jnp.stack([seen.sum(-1), forms[..., 1], *by_length], -1) * known[:, None]
    mean, shift = scaled[..., 0], secrets["constant"] + forms[..., 0] + scaled[..., 1:].sum(-1)
    squared = jnp.concatenate([seen, mean[..., None], forms[..., 2:]], -1) ** 2
    second, mean_square, squares = jnp.split(squared, [len(visible), len(visible) + 1], -1)
    variance = second.sum(-1) * (1.0 / count).astype(np.float32)[:, None] - mean_square[..., 0]
    weights = [jnp.broadcast_to(w, shape) for w in secrets["features"].T]
    left = [mean, variance, mean_square[..., 0], *jnp.moveaxis(squares, -1, 0), variance, mean, variance]
    right = [weights[0], weights[1], weights[2], *weights[6:], weights[5], variance, variance]
    products = jnp.stack(left, -1) * jnp.stack(right, -1)
    last = products[..., -2:]  # m v, v²
    higher = jnp.stack([weights[3], weights[4] + products[..., -3]], -1) * last
    return shift + products[..., :-3].sum(-1) + higher.sum(-1)


def refinement(plan: Plan, part: Secrets, y: Array, visible: np.ndarray, count: np.ndarray) -> Array:
    """Returns the step of the row sum, in radii, (T, H)."""
    y = y - part["center"][:, None]
    if plan.clamp:
        y = jnp.clip(y, -part["limit"][:, None], part["limit"][:, None])
    weights = polynomial(y, part["coefficients"], monic=False)
    weights = weights if visible.all() else weights * visible[:, None]
    for _ in range(plan.power.bit_length() - 1):
        weights = weights * weights
    row_sum = weights.sum(-1) * (count**-plan.alpha).astype(np.float32)[:, None]
    z = jnp.clip(row_sum, *ROW_SUMS) - 1.0
    steps = part["steps"]
    g = steps[:, -1]
    for k in range(steps.shape[1] - 2, -1, -1):
        g = g * z + steps[:, k]
    return g


def polynomial(y: Array, coefficients: Array, monic: bool) -> Array:
    """Returns p(y) of (T, H, T) by ascending coefficients (H, P + 1), of which the last is 1 if monic."""
    c = coefficients[:, :, None]
    degree = coefficients.shape[1] - 1
    p = y + c[:, degree - 1] if monic else c[:, degree] * y + c[:, degree - 1]
    for k in range(degree - 2, -1, -1):
        p = p * y + c[:, k]
    return p
