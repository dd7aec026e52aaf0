"""Attention of one sequence in JAX, for secret numbers: products and sums, and what an arm cannot do without.

Letters: T tokens, H heads, D head dim, C columns beside the keys, R forms of the query whose squares join the moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .owner import Plan

Array = Any
Secrets = Mapping[str, Array]
HIDDEN = -64.0  # nats; SPU's exp, (1 + x / 256)^256, is none below −256
ROW_SUMS = (0.2, 5.0)  # between which a refinement looks at its row sum
# Heads in one product of matrices, see `by_head`: where messages, and where arithmetic takes the time.
LONG = 64  # tokens
HEADS_AT_ONCE = {"short": 6, "long": 4}


def attention(plan: Plan, secrets: Secrets, query: Array, key: Array, value: Array, visible: np.ndarray) -> Array:
    """Returns the output (T, H, D) of one sequence.

    Args:
        plan: public, of `owner`.
        secrets: of `owner`.
        query, key, value: (T, H, D), with the owner's factors in them.
        visible: public, (T, T), 1 for the keys that a row sees, else 0.
    """
    keys = key.transpose(1, 2, 0)
    if plan.kind == "products":
        return by_head(by_head(query, keys), value.transpose(1, 0, 2))
    if "columns" in secrets:
        keys = jnp.concatenate([keys, secrets["columns"]], 2)
    if plan.moments and plan.scaled:
        keys = jnp.concatenate([keys, folded(key)[..., None]], 2)
    products = by_head(query, keys)
    scores = products[..., : len(visible)]
    if plan.kind == "softmax":
        return divided_by_sums(softmax_weights(scores, visible), value)
    if plan.kind == "jax.nn.softmax":
        return by_head(jax.nn.softmax(lowered(scores, visible), -1), value.transpose(1, 0, 2))
    if plan.expanded:
        return expanded(plan, secrets, products, value)
    count = visible.sum(-1, dtype=np.float32)
    shift = shift_of_all(plan, secrets, products) if plan.scaled else row_shift(plan, secrets, products, visible, count)
    y = scores + (-shift)[..., None]
    for number in range(plan.refinements):
        part = {name.partition(".")[2]: x for name, x in secrets.items() if name.startswith(f"refinement{number}.")}
        y = y - refinement(plan, part, y, visible, count)[..., None]
    if plan.clamp:
        y = jnp.clip(y, -secrets["limit"][:, None], secrets["limit"][:, None])
    weights = polynomial(y, secrets["coefficients"], plan.monic, plan.factored)
    weights = weights if visible.all() else weights * visible[:, None]
    for _ in range(plan.power.bit_length() - 1):
        weights = weights * weights
    if plan.row_sum:
        # Without |·|, which is a comparison: an l1 polynomial is positive on the scores of its calibration.
        return divided_by_sums(weights, value)
    output = by_head(weights, value.transpose(1, 0, 2))
    return output if plan.scaled else output * (count**-plan.alpha).astype(np.float32)[:, None, None]


def expanded(plan: Plan, secrets: Secrets, products: Array, value: Array) -> Array:
    """Returns the output (T, H, D) of a cubic with moments whose rows see all keys, from the squares of the moments.

    With s the score and σ the shift, in radii, y³ + a y + c at y = s − σ is

        (s² + 3σ² + a) (s − 3σ) + (8σ (σ − g) + b) (σ + g)        8g³ + 2a g = c,  b = 2a + 8g²

    so that the squares of the scores serve twice. The second term, alike for all keys of a row, is one more column of
    weights, whose value is the sum of all values.

    Args:
        plan, secrets: see `attention`; the coefficients are a, b and g.
        products: of the query with keys, columns and the sum of the keys, (T, H, T + C + 1).
        value: (T, H, D).
    """
    keys = len(products)
    squared = products * products
    shift = shift_of_all(plan, secrets, products, squared)
    a, b, g = secrets["coefficients"].T
    square, other = jnp.stack([shift, shift]) * jnp.stack([shift, shift - g])
    added = times(3, square) + a, times(3, -shift)
    column = times(8, other) + b - added[0], times(4, shift) + g
    left, right = (
        jnp.concatenate([x[..., :keys], last[..., None]], -1) + every[..., None]
        for x, last, every in zip((squared, products), column, added, strict=True)
    )
    values = jnp.concatenate([value, folded(value)[None]])
    return by_head(left * right, values.transpose(1, 0, 2))


def divided_by_sums(weights: Array, value: Array) -> Array:
    """Returns the output (T, H, D) of weights (T, H, T) over their row sums, which are one more column of values."""
    columns = jnp.concatenate([value.transpose(1, 0, 2), np.ones((*weights.shape[1:], 1), np.float32)], -1)
    output = by_head(weights, columns)
    return output[..., :-1] * (1.0 / output[..., -1])[..., None]


def by_head(rows: Array, columns: Array) -> Array:
    """Returns the products of each head, several in one: (T, H, K), (H, K, N) → (T, H, N).

    A secret product of matrices has a price of its own in messages, so that the right factors of `HEADS_AT_ONCE` heads
    stand on the diagonal of one matrix, with public zeros elsewhere: that many times the arithmetic and the bytes.
    """
    heads, together = rows.shape[1], HEADS_AT_ONCE["long" if len(rows) > LONG else "short"]
    parts = [slice(first, first + together) for first in range(0, heads, together)]
    return jnp.concatenate([_in_one(rows[:, part], columns[part]) for part in parts], 1)


def _in_one(rows: Array, columns: Array) -> Array:
    heads, inner, outer = columns.shape
    diagonal = lax.pad(columns, np.float32(0.0), [(0, 0, heads), (0, 0, 0), (0, 0, 0)])
    matrix = diagonal.reshape(heads, heads, inner, outer).transpose(0, 2, 1, 3).reshape(heads * inner, heads * outer)
    return (rows.reshape(len(rows), heads * inner) @ matrix).reshape(len(rows), heads, outer)


def softmax_weights(scores: Array, visible: np.ndarray) -> Array:
    """Returns exp(x − max): the output is divided once a row, not each weight."""
    scores = lowered(scores, visible)
    return jnp.exp(scores + (-scores.max(-1))[..., None])


def lowered(scores: Array, visible: np.ndarray) -> Array:
    """Returns the scores with `HIDDEN` added to those that a row does not see, whose exp is then 0 in fixed point."""
    return scores if visible.all() else scores + np.where(visible > 0.0, 0.0, HIDDEN).astype(np.float32)[:, None]


def shift_of_all(plan: Plan, secrets: Secrets, products: Array, squared: Array | None = None) -> Array:
    """Returns what `row_shift` does, of rows that see all keys: (T, H) or (H,).

    Args:
        plan: public.
        secrets: of `owner.for_length`.
        products: of the query with keys, columns and the sum of the keys, (T, H, T + C + 1).
        squared: their squares, where they are at hand.
    """
    if "columns" not in secrets:
        return secrets["constant"]
    keys = len(products)
    shift = secrets["constant"] + products[..., keys]
    if not plan.moments:
        return shift
    squared = products * products if squared is None else squared
    mean, variance, mean_square, *squares = moments_of_all(plan, products, squared)
    return shift + featured(secrets["features"], mean, variance, mean_square, squares)


def moments_of_all(plan: Plan, products: Array, squared: Array) -> Array:
    """Returns m, v, m² and the squares of the forms, (3 + R, T, H): one product with a public matrix, cut back once.

    n Σ x² − (Σ x)² is n² v. A product sums much faster under SPU than `sum` does.

    Args:
        plan: public.
        products, squared: with T keys, the key shift, R forms and the sum of the keys, (T, H, T + R + 2).
    """
    keys, heads, width = products.shape
    public = np.zeros((width + 1, width - keys + 1), np.float32)
    public[-1, 0] = 1.0 / keys
    public[:keys, 1], public[-2, 1:3] = keys * plan.inverse_square, [-plan.inverse_square, plan.inverse_square]
    public[keys + 1 : -2, 3:] = np.eye(width - keys - 2)
    rows = jnp.concatenate([squared, products[..., -1:]], -1).reshape(keys * heads, width + 1)
    return (rows @ public).T.reshape(-1, keys, heads)


def folded(x: Array) -> Array:
    """Returns the sum over the first axis by halves: SPU's own goes from element to element."""
    while len(x) > 1:
        half, rest = len(x) // 2, x[len(x) // 2 * 2 :]
        x = x[:half] + x[half : 2 * half]
        x = jnp.concatenate([x, rest]) if len(rest) else x
    return x[0]


def times(number: int, x: Array) -> Array:
    """Returns number · x by sums, which cost nothing."""
    if number == 1:
        return x
    half = times(number // 2, x)
    return half + half + x if number % 2 else half + half


def row_shift(plan: Plan, secrets: Secrets, products: Array, visible: np.ndarray, count: np.ndarray) -> Array:
    """Returns center + s_i in radii, (T, H) or (H,); DESIGN.md, "The row shift"."""
    if "columns" not in secrets:
        return secrets["constant"]
    scores, forms = products[..., : len(visible)], products[..., len(visible) :]
    if not plan.moments:
        return secrets["constant"] + forms[..., 0]
    held = np.clip(count, *plan.lengths)
    seen = scores if visible.all() else scores * visible[:, None]
    # Products of independent numbers are one, each round being one whatever its size.
    by_length = [jnp.broadcast_to(secrets[name], forms.shape[:2]) for name in ("log", "held_log", "held_inverse")]
    known = np.stack([1.0 / count, np.log(held), np.log(count), np.log(held), 1.0 / held], -1).astype(np.float32)
    scaled = jnp.stack([seen.sum(-1), forms[..., 1], *by_length], -1) * known[:, None]
    mean, shift = scaled[..., 0], secrets["constant"] + forms[..., 0] + scaled[..., 1:].sum(-1)
    squared = jnp.concatenate([seen, mean[..., None], forms[..., 2:]], -1) ** 2
    second, mean_square, squares = jnp.split(squared, [len(visible), len(visible) + 1], -1)
    variance = second.sum(-1) * (1.0 / count).astype(np.float32)[:, None] - mean_square[..., 0]
    return shift + featured(secrets["features"], mean, variance, mean_square[..., 0], jnp.moveaxis(squares, -1, 0))


def featured(weights: Array, mean: Array, variance: Array, mean_square: Array, squares: Iterable[Array]) -> Array:
    """Returns a₀ m + a₁ v + a₂ m² + Σ b (u·q)² + a₃ m v + (a₄ + a₅ v) v², (T, H), with the products of a line in one.

    Args:
        weights: a₀ to a₅, then b, (H, 6 + R).
        mean, variance, mean_square: m, v and m², (T, H).
        squares: (u·q)², R of (T, H).
    """
    first = [jnp.broadcast_to(w, mean.shape) for w in weights.T]
    left = jnp.stack([mean, variance, mean_square, *squares, variance, mean, variance])
    right = jnp.stack([*first[:3], *first[6:], first[5], variance, variance])
    products = left * right
    last = products[-2:]  # m v, v²
    higher = jnp.stack([first[3], first[4] + products[-3]]) * last
    return folded(jnp.concatenate([products[:-3], higher]))


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


def polynomial(y: Array, coefficients: Array, monic: bool, factored: bool = False) -> Array:
    """Returns p(y) of (T, H, T).

    Args:
        y: (T, H, T).
        coefficients: ascending, (H, P + 1).
        monic: the last is 1.
        factored: they are c, a, b, 1 of (y² + a) (y + b) + c: a square is cheaper than a product.
    """
    c = coefficients[:, :, None]
    degree = coefficients.shape[1] - 1
    if factored:
        return (y * y + c[:, 1]) * (y + c[:, 2]) + c[:, 0]
    p = y + c[:, degree - 1] if monic else c[:, degree] * y + c[:, degree - 1]
    for k in range(degree - 2, -1, -1):
        p = p * y + c[:, k]
    return p
