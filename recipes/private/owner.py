"""What the owner of a model works out in plain text before sharing it: attention with few products of secrets.

Scores are counted in radii, y = x / radius_h, by weights of the query that are scaled by scaling / radius_h. What is
linear in the query (key shift, length shift, the forms whose squares join the moments) is columns beside the keys,
and so part of the product with them. The highest coefficient, to the power of the spec, is a factor of the values;
what is left of the polynomial has 1 there, and costs degree − 1 products a score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_polyattn.spec import Polynomial

from .checkpoint import Checkpoint, PolynomialLayer

# Powers of a radius in the features m, v, m², m v, v², v³; DESIGN.md, "The row shift".
POWERS = (1, 2, 2, 3, 4, 6)
ALPHA = {"rsqrt": 0.5, "mean": 1.0, "none": 0.0, "l1": 0.0}
#: Above this a coefficient, in units of the highest, would cost the values their precision.
LARGEST = 64.0
#: Of the weights before a row sum divides them.
TOP = 1024.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What of a layer's attention is public: everybody runs the same program.

    Attributes:
        kind: softmax, jax.nn.softmax, polynomial, or products, which has nothing between the two products of matrices.
        degree, power, clamp: of the polynomial.
        row_sum: whether its row sum divides.
        alpha: of the fixed normalizer n^(−alpha), 0 for l1.
        monic: whether the highest coefficient is in the values.
        factored: whether the coefficients are those of a cubic (y² + a) (y + b) + c.
        expanded: whether the cubic is in powers of the score itself, see `attention.expanded`.
        moments: whether mean and variance of the scores shift a row.
        lengths: of the calibration, between which n is held for the features of the length.
        refinements: how often the row sum does.
        scaled: whether rows see all keys, and what their number decides is in the weights.
        inverse_square: n^(−2) as a fixed-point number holds it, where it does.
    """

    kind: str = "softmax"
    degree: int = 0
    power: int = 1
    clamp: bool = False
    row_sum: bool = False
    alpha: float = 0.0
    monic: bool = True
    factored: bool = False
    expanded: bool = False
    moments: bool = False
    lengths: tuple[float, float] = (1.0, 1e9)
    refinements: int = 0
    scaled: bool = False
    inverse_square: float = 0.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """A layer's attention, ready to be shared.

    Attributes:
        plan: public.
        secrets: float32 arrays by name, for `attention.attention`.
        query_scale, value_scale: factors of each head's queries and values, (H,); the weights take them.
    """

    plan: Plan
    secrets: dict[str, np.ndarray]
    query_scale: np.ndarray
    value_scale: np.ndarray


def prepare_layer(layer: PolynomialLayer | None, heads: int, head_dim: int) -> Prepared:
    """Returns the attention of a layer; None is softmax."""
    scaling, ones = head_dim**-0.5, np.ones(heads)
    if layer is None:
        return Prepared(Plan(), {}, scaling * ones, ones)
    spec, tensors = layer.spec, layer.tensors
    coefficients, unit, monic, leading = _scaled(effective_coefficients(layer, heads), spec)
    factored = monic and spec.degree == 3
    if factored:
        coefficients = coefficients - coefficients[:, 1:2] * coefficients[:, 2:3] * [1.0, 0.0, 0.0, 0.0]
    radius = (tensors["radius"] if layer.interval else ones) / unit
    alpha = ALPHA[spec.normalizer]
    secrets: dict[str, Any] = {"coefficients": coefficients} | _shift(layer, radius, alpha)
    if layer.clamp:
        secrets["limit"] = unit
    for number in range(spec.refinements):
        secrets |= _refinement(layer, number, radius)
    plan = Plan(
        kind="polynomial",
        degree=spec.degree,
        power=spec.power,
        clamp=layer.clamp,
        row_sum=spec.normalizer == "l1",
        alpha=alpha,
        monic=monic,
        factored=factored,
        moments=layer.moments,
        lengths=tuple(tensors["moments.lengths"].tolist()) if layer.moments else (1.0, 1e9),
        refinements=spec.refinements,
    )
    value_scale = ones if plan.row_sum else leading**spec.power
    return Prepared(
        plan, {name: np.asarray(x, np.float32) for name, x in secrets.items()}, scaling / radius, value_scale
    )


def effective_coefficients(layer: PolynomialLayer, heads: int) -> np.ndarray:
    """Returns the coefficients of p in ascending powers of t, (H, P + 1): trained ones with their change."""
    return np.broadcast_to(changed_coefficients(layer.tensors, ""), (heads, layer.spec.degree + 1))


def changed_coefficients(tensors: Mapping[str, np.ndarray], part: str) -> np.ndarray:
    """Returns c + δA of a polynomial whose tensors begin with `part`; c where a checkpoint has no δ."""
    c = tensors[f"{part}coefficients"]
    if f"{part}delta" not in tensors:
        return c
    return c + (tensors[f"{part}delta"][:, :, None] * tensors[f"{part}directions"]).sum(-2)


def _scaled(c: np.ndarray, spec: Polynomial) -> tuple[np.ndarray, np.ndarray, bool, np.ndarray]:
    """Returns the coefficients to compute with, the unit of t in them (H,), if the last is 1, and their factor (H,).

    A row sum does not see a factor, but fixed-point numbers do: the largest weight is to be `TOP`, so that rows far
    below it keep their digits. With the highest coefficient 1 only the unit of t can see to that.
    """
    leading, ones, top = c[:, -1], np.ones(len(c)), c.sum(1)
    powers = np.arange(c.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = (TOP ** (1.0 / spec.power) * leading / top) ** (1.0 / spec.degree) if spec.normalizer == "l1" else ones
        monic = c / leading[:, None] * unit[:, None] ** (spec.degree - powers)
    if np.isfinite(monic).all() and np.abs(monic).max() <= LARGEST:
        return monic, unit, True, leading
    if spec.normalizer == "l1":
        return c * (TOP ** (1.0 / spec.power) / top)[:, None], ones, False, ones
    return c, ones, False, ones


def _shift(layer: PolynomialLayer, radius: np.ndarray, alpha: float) -> dict[str, np.ndarray]:
    """Returns what moves the scores of a row, in radii; see DESIGN.md, "The row shift"."""
    tensors = layer.tensors
    center = tensors["center"] if layer.interval else np.zeros_like(radius)
    if not layer.shifted:
        return {"constant": center / radius}
    mu = tensors["key_shift"]
    if not layer.moments:
        return {"constant": center / radius, "columns": mu[:, :, None]}
    mean, nu, squares = (tensors[f"moments.{name}"] for name in ("means", "length_shift", "squares"))
    weights = tensors["moments.weights"] / tensors["moments.scales"]
    powers = np.array([*POWERS, *[2] * squares.shape[1]])
    learned = np.concatenate([weights[:, :6], weights[:, 8:]], 1)
    learned[:, 0] += 1.0  # the prior m + v / 2
    learned[:, 1] += 0.5
    columns = np.concatenate([(mu - mean[:, 6:7] * nu)[:, :, None], nu[:, :, None], squares.transpose(0, 2, 1)], 2)
    return {
        "constant": (center - (weights * mean).sum(1)) / radius,
        "log": (1.0 - alpha) / radius,
        "held_log": weights[:, 6] / radius,
        "held_inverse": weights[:, 7] / radius,
        "features": learned * radius[:, None] ** (powers - 1),
        "columns": columns,
    }


def _refinement(layer: PolynomialLayer, number: int, radius: np.ndarray) -> dict[str, np.ndarray]:
    """Returns one look at the row sum: its polynomial in y less the center, its limits and the step, in radii."""
    coefficients = changed_coefficients(layer.tensors, f"refinements.{number}.")
    steps, center, own = (layer.tensors[f"refinements.{number}.{name}"] for name in ("steps", "center", "radius"))
    coefficients = np.broadcast_to(coefficients, (len(radius), coefficients.shape[1]))
    scaled = coefficients * (radius / own)[:, None] ** np.arange(coefficients.shape[1])
    name = f"refinement{number}"
    return {
        f"{name}.coefficients": scaled,
        f"{name}.center": center / radius,
        f"{name}.limit": own / radius,
        f"{name}.steps": steps / radius[:, None],
    }


def for_length(layer: Prepared, length: int, fraction_bits: int) -> Prepared:
    """Returns the attention of rows that see all of so many keys: what a length decides is in the owner's numbers.

    n^(−alpha) is a factor of the values then, which the weights take.

    Args:
        layer: of `prepare`.
        length: public.
        fraction_bits: of the fixed-point numbers, in which n^(−2) has few digits.
    """
    plan, secrets = replace(layer.plan, scaled=True), dict(layer.secrets)
    if plan.moments:
        held = float(np.clip(length, *plan.lengths))
        log, held_log, held_inverse = (secrets.pop(name) for name in ("log", "held_log", "held_inverse"))
        constant = secrets["constant"] + log * np.log(length) + held_log * np.log(held) + held_inverse / held
        linear, of_length, squares = np.split(secrets["columns"], [1, 2], -1)
        columns = np.concatenate([linear + np.log(held) * of_length, squares], -1)
        inverse_square = max(round(2.0**fraction_bits / length**2), 1) / 2.0**fraction_bits
        plan = replace(plan, inverse_square=inverse_square)
        # v, m², m v, v² and v³ are off by what n^(−2) is, to the power that they have of it.
        excess = np.ones(secrets["features"].shape[1])
        excess[1:6] = (length**2 * inverse_square) ** np.array([1, 1, 1, 2, 3])
        own = {"constant": constant, "columns": columns, "features": secrets["features"] / excess}
        if plan.factored and plan.power == 1 and not (plan.clamp or plan.refinements or plan.row_sum):
            inflection, own["coefficients"] = _at_inflection(secrets["coefficients"])
            own["constant"] = constant + inflection
            plan = replace(plan, expanded=True)
        secrets |= {name: np.asarray(x, np.float32) for name, x in own.items()}
    return replace(layer, plan=plan, secrets=secrets)


def _at_inflection(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where cubics have their inflection, (H,), and a, b and g of `attention.expanded` from there, (H, 3).

    Args:
        factors: c, a, b, 1 of (y² + a) (y + b) + c, (H, 4).
    """
    c, a, b, _ = factors.astype(np.float64).T
    inflection = -b / 3.0
    slope = a - b**2 / 3.0
    height = c + a * b + inflection * a - 2.0 * inflection**3
    roots = [np.roots([8.0, 0.0, 2.0 * slope, -height]) for slope, height in zip(slope, height, strict=True)]
    real = np.array([found[np.abs(found.imag).argmin()].real for found in roots])
    return inflection, np.stack([slope, 2.0 * slope + 8.0 * real**2, real], -1)


def prepare(checkpoint: Checkpoint, head_dim: int) -> list[Prepared]:
    """Returns the attention of each layer of a model."""
    return [prepare_layer(layer, checkpoint.heads, head_dim) for layer in checkpoint.polynomials]
