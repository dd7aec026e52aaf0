"""Norms of attention and of its Jacobian beside softmax's, layer by layer."""

from __future__ import annotations

from typing import Any

from .style import GRID, INK, canvas, color_of, legend_below, plain_numbers, styled


@styled
def draw_norms(diagnosis: Any) -> Any:
    """Returns a figure of a `Diagnosis`: norms of the attention matrices left, of their Jacobians right.

    Lines are means over heads, bands reach from the lowest head to the highest, dashes are softmax's bounds of
    arXiv 2410.18613, Theorem 4.1.
    """
    figure, ((left, right),) = canvas(1, 2, 10.5, 4.4)
    _draw(left, "Attention matrix ‖A‖", diagnosis, ("softmax_norm", "polynomial_norm", "bound"))
    _draw(right, "Jacobian ‖∇A‖", diagnosis, ("softmax_jacobian", "polynomial_jacobian", "jacobian_bound"))
    left.set_ylabel("Frobenius norm, mean and range over heads")
    legend_below(figure, left)
    return figure


def _draw(axes: Any, title: str, diagnosis: Any, names: tuple[str, str, str]) -> None:
    numbers = range(len(diagnosis.layers))
    for name, label, color in ((names[0], "softmax", INK), (names[1], diagnosis.spec, color_of(0))):
        heads = [getattr(layer, name) for layer in diagnosis.layers]
        axes.plot(numbers, [sum(layer) / len(layer) for layer in heads], "o-", color=color, label=label)
        low, high = [min(layer) for layer in heads], [max(layer) for layer in heads]
        axes.fill_between(numbers, low, high, color=color, alpha=0.15, linewidth=0)
    bounds = [getattr(layer, names[2]) for layer in diagnosis.layers]
    axes.plot(numbers, bounds, "--", color=GRID, label="softmax's bound, √N left and 2√N right")
    axes.set(title=title, xlabel="patched layer", yscale="log")
    plain_numbers(axes.yaxis)
    axes.xaxis.get_major_locator().set_params(integer=True)
