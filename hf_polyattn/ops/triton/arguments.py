"""The arguments of the kernels of backend `triton`, and what they compute: no exponential, no running maximum.

    t_ij = a · q_i·k_j + b_i                      a = scaling / radius, b_i = −center_i / radius; may be clamped
    w_ij = m_ij · p(t_ij)^s                       out_i = r_i Σ_j w_ij v_j
    dw   = g − δ_i sign w                         g_ij = dO_i·v_j; δ_i = dO_i·O_i for l1, else 0
    dp   = dw · s p^(s−1)                         dc_k = Σ r_i dp t^k
    dt   = dp · p'(t)                             dcenter_i = −r_i Σ_j dt / radius, dQ_i = r_i a Σ_j dt k_j

Scores, polynomials and sums are float32. Factors of whole rows (r, and for a monomial its coefficient) are applied
once to the accumulated row where the kernel's rows are queries. w and dt are cast to the operands' dtype last, for
the second matrix product; in float16 each row is divided before by its largest magnitude so far, and its sums with it,
so that neither a w of e^-80 nor a score of 1e3 cubed leaves the range.

Which keys a query row sees is an interval [low, high), from `causal`, `window` and `ranges` together, and a dense
mask on top. Key blocks that no row of a tile sees are not visited, and blocks that all rows see whole are visited in
a loop without masks.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Operand(NamedTuple):
    """A tensor (batch, head, row, contiguous columns): its pointer and strides in elements."""

    pointer: Any
    batch: int
    head: int
    row: int


class Scores(NamedTuple):
    """What makes t of a score: coefficients (H, P + 1), radius (H,), center (B, H, Tq), each with strides."""

    coefficients: Any
    coefficient_head: int
    coefficient_degree: int
    radius: Any
    radius_head: int
    center: Any
    center_batch: int
    center_head: int
    center_row: int
    scaling: float


class Visibility(NamedTuple):
    """Lengths, window, ranges (B, Tq, 2) and a dense mask (B, H, Tq, Tk); None where there is none."""

    q_len: int
    k_len: int
    window: Any
    ranges: Any
    range_batch: int
    range_row: int
    range_bound: int
    mask: Any
    mask_batch: int
    mask_head: int
    mask_row: int
    mask_key: int


class Dropout(NamedTuple):
    """The seed, the least word (signed) that keeps a weight, and the scale of what is kept."""

    seed: Any
    threshold: int
    scale: float


class Refinement(NamedTuple):
    """A refinement's polynomial and step, contiguous float32: (H, P + 1), (H,), (H,) and (H, 5)."""

    coefficients: Any
    center: Any
    radius: Any
    steps: Any


class Shift(NamedTuple):
    """The row shift of a module, contiguous float32, as `patching.row_shift` has it; None for what there is not.

    Attributes:
        mean, variance: of the scaled scores of each row, (B, H, Tq), where they are known beforehand.
        first, second: `Refinement`.
    """

    key_shift: Any
    weights: Any = None
    means: Any = None
    scales: Any = None
    length_shift: Any = None
    squares: Any = None
    lengths: Any = None
    mean: Any = None
    variance: Any = None
    first: Any = None
    second: Any = None


class Static(NamedTuple):
    """What a kernel is compiled for. Triton 3.6 takes no field for a constant in a shape or a static_range before it
    has a name of its own (`degree: tl.constexpr = S.degree`), or is an argument.

    Attributes:
        squarings: log2 of the power.
        monomial: only the highest coefficient counts.
        fold: t is the bare product q·k, and a^P goes with the coefficient to the rows.
        causal, ranged: ranged is 0 without ranges, 1 with one range a batch entry, 2 with one a row.
        q_even, k_even: whether the blocks divide Tq and Tk.
        scaled: operands are float16.
    """

    degree: int
    squarings: int
    normalizer: str
    monomial: bool
    fold: bool
    clamp: bool
    causal: bool
    ranged: int
    q_even: bool
    k_even: bool
    scaled: bool
    precision: str
    head_dim: int
    value_dim: int
    block_m: int
    block_n: int
