"""From scores to weights and their derivatives, in the Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_coefficients(scores, head, S: tl.constexpr):
    """Returns c_0 … c_P of a head (a scalar, or a tensor of heads); of a monomial c_P only."""
    degree: tl.constexpr = S.degree
    c = ()
    for k in tl.static_range(degree if S.monomial else 0, degree + 1):
        pointer = scores.coefficients + head * scores.coefficient_head + k * scores.coefficient_degree
        c = c + (tl.load(pointer).to(tl.float32),)
    return c


@triton.jit
def load_polynomial(scores, head, S: tl.constexpr):
    """Returns the coefficients of a head, 1 / radius and a."""
    c = load_coefficients(scores, head, S)
    inverse_radius = load_inverse_radius(scores, head)
    return c, inverse_radius, scores.scaling * inverse_radius


@triton.jit
def load_inverse_radius(scores, head):
    """Returns 1 / radius of a head."""
    inverse = head * 0.0 + 1.0
    if scores.radius is not None:
        inverse = 1.0 / tl.load(scores.radius + head * scores.radius_head).to(tl.float32)
    return inverse


@triton.jit
def load_offset(scores, entry, head, rows, inverse_radius):
    """Returns b_i."""
    offset = rows * 0.0
    if scores.center is not None:
        pointer = scores.center + entry.to(tl.int64) * scores.center_batch + head.to(tl.int64) * scores.center_head
        offset = -inverse_radius * tl.load(pointer + rows.to(tl.int64) * scores.center_row).to(tl.float32)
    return offset


@triton.jit
def raise_to(t, EXPONENT: tl.constexpr):
    """Returns t^EXPONENT, 0..8, in the fewest multiplies."""
    t2 = t * t
    if EXPONENT == 0:
        result = t * 0.0 + 1.0
    elif EXPONENT == 1:
        result = t
    elif EXPONENT == 2:
        result = t2
    elif EXPONENT == 3:
        result = t2 * t
    elif EXPONENT == 4:
        result = t2 * t2
    elif EXPONENT == 5:
        result = t2 * t2 * t
    elif EXPONENT == 6:
        t3 = t2 * t
        result = t3 * t3
    elif EXPONENT == 7:
        t3 = t2 * t
        result = t3 * t3 * t
    else:
        t4 = t2 * t2
        result = t4 * t4
    return result


@triton.jit
def compute_t(x, a, b, scores, S: tl.constexpr):
    """Returns t of the products x = q·k."""
    if S.fold:
        t = x
    elif scores.center is not None:
        t = x * a + b
    else:
        t = x * a
    if S.clamp:
        t = tl.clamp(t, -1.0, 1.0)
    return t


@triton.jit
def evaluate_polynomial(t, c, S: tl.constexpr):
    """Returns p(t), by Horner's rule."""
    degree: tl.constexpr = S.degree
    p = c[degree] * t + c[degree - 1]
    for k in tl.static_range(degree - 2, -1, -1):
        p = p * t + c[k]
    return p


@triton.jit
def scale_slopes(c, factor, S: tl.constexpr):
    """Returns the coefficients of factor·p'(t); of a monomial the factor that rows carry."""
    degree: tl.constexpr = S.degree
    if S.monomial:
        slopes = (degree * c[0] * (raise_to(factor, degree) if S.fold else factor),)
    else:
        slopes = ()
        for k in tl.static_range(1, degree + 1):
            slopes = slopes + (k * factor * c[k],)
    return slopes


@triton.jit
def evaluate_slope(t, slopes, S: tl.constexpr):
    """Returns p'(t) with the factor of `scale_slopes`."""
    degree: tl.constexpr = S.degree
    if degree == 1:
        p = t * 0.0 + slopes[0]
    else:
        p = slopes[degree - 1] * t + slopes[degree - 2]
        for k in tl.static_range(degree - 3, -1, -1):
            p = p * t + slopes[k]
    return p


@triton.jit
def compute_weights(t, c, S: tl.constexpr):
    """Returns w over `compute_factor`."""
    squarings: tl.constexpr = S.squarings
    if S.monomial:
        w = raise_to(t, S.degree)
        if squarings > 0:
            w *= c[0]
    else:
        w = evaluate_polynomial(t, c, S)
    for _ in tl.static_range(squarings):
        w *= w
    return w


@triton.jit
def compute_factor(c, a, S: tl.constexpr):
    """Returns the factor of w that rows carry: the coefficient of a monomial that is not squared, else 1."""
    factor = a * 0.0 + 1.0
    if S.monomial and S.squarings == 0:
        factor = c[0]
        if S.fold:
            factor *= raise_to(a, S.degree)
    return factor


@triton.jit
def compute_derivatives(t, c, slopes, S: tl.constexpr):
    """Returns w over `compute_factor`, dw/dp, and dp/dt with the slopes' factor, of a monomial over its only slope."""
    squarings: tl.constexpr = S.squarings
    if S.monomial:
        inner = raise_to(t, S.degree - 1)
        p = inner * t
        if squarings > 0:
            p *= c[0]
    else:
        inner = evaluate_slope(t, slopes, S)
        p = evaluate_polynomial(t, c, S)
    w = p
    outer = p
    if squarings > 0:
        outer = p * (1 << squarings)
        w = p * p
        for _ in tl.static_range(squarings - 1):
            outer *= w
            w *= w
    return w, outer, inner


@triton.jit
def subtract_delta(dw, w, delta, S: tl.constexpr):
    """Returns dw − δ sign w for l1, else dw; a w that is a square needs no sign."""
    if S.normalizer == "l1":
        if S.squarings > 0:
            dw -= delta
        else:
            dw -= tl.where(w > 0.0, delta, tl.where(w < 0.0, -delta, 0.0))
    return dw
