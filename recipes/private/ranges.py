"""What a fixed-point number of a ring cannot hold, found in plain text, before anything is shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import numpy as np
from jax import tree_util

from hf_polyattn.errors import PolyAttnError

FIELDS = {"FM64": 64, "FM128": 128}


class RangeError(PolyAttnError):
    """A value that the ring cannot hold: in there it would be any other."""


def largest_allowed(field: str, fraction_bits: int) -> float:
    """Returns the largest magnitude of a product: until it is cut back it has twice the fraction, and a bit of sign.

    One more is left free: SPU's truncation is wrong with a probability that grows with the value.
    """
    return 2.0 ** (FIELDS[field] - 2 * fraction_bits - 2)


def largest(function: Callable[..., Any], *arguments: Any) -> tuple[float, str]:
    """Returns the largest magnitude that any step of a function has, on these plain arguments, and the step's name."""
    closed = jax.make_jaxpr(function)(*arguments)
    leaves = tree_util.tree_leaves(arguments)
    sizes = [(float(np.abs(np.asarray(leaf)).max()), "an input") for leaf in leaves]
    return max([*sizes, *_sizes(closed.jaxpr, closed.consts, leaves)[0]])


def _sizes(jaxpr: Any, consts: Any, arguments: Any) -> tuple[list[tuple[float, str]], list[Any]]:
    """Returns the largest magnitude of each step, and the outputs."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
    sizes: list[tuple[float, str]] = []

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs, inner = [read(atom) for atom in equation.invars], equation.params.get("jaxpr")
        if equation.primitive.name in ("pjit", "custom_jvp_call") or inner is not None:
            inner = inner if inner is not None else equation.params["call_jaxpr"]
            found, outputs = _sizes(inner.jaxpr, inner.consts, inputs)
            sizes += found
            values.update(zip(equation.outvars, outputs, strict=True))
            continue
        outputs = equation.primitive.bind(*inputs, **equation.params)
        outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
        finite = [np.asarray(x) for x in outputs if np.issubdtype(np.asarray(x).dtype, np.floating) and np.size(x)]
        sizes += [(float(np.abs(x[np.isfinite(x)]).max(initial=0.0)), equation.primitive.name) for x in finite]
    return sizes, [read(atom) for atom in jaxpr.outvars]


def check(name: str, field: str, fraction_bits: int, function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the largest magnitude of a program on these plain arguments.

    Raises:
        RangeError: the ring cannot hold it.
    """
    size, step = largest(function, *arguments)
    allowed = largest_allowed(field, fraction_bits)
    if size > allowed:
        raise RangeError(
            f"{name} reaches {size:.3g} in a {step}, and {field} with {fraction_bits} fractional bits holds products "
            f"up to {allowed:.3g}. Take --field FM128, or fewer --fraction_bits."
        )
    return size
