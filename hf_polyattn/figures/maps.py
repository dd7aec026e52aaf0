"""One head's attention: softmax's, the polynomial's and their difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .style import NEGATIVE, canvas, signed_colors, styled

_LABELLED = 40  # tokens, beyond which their names would lie on each other


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """The attention of one head on one sequence; arrays are of numpy.

    Attributes:
        title: which head of which layer.
        softmax, polynomial: weights (rows, keys); those of a polynomial may be negative, and need not sum to 1.
        rows, keys: names of the tokens; empty where they have none.
        picture: (height, width, 3), 0 to 1, that the keys are patches of; None where there is none.
        grid: (down, across) patches of the picture, the last ones of the keys.
    """

    title: str
    softmax: Any
    polynomial: Any
    rows: Sequence[str] = ()
    keys: Sequence[str] = ()
    picture: Any = None
    grid: tuple[int, int] | None = None

    def describe(self) -> str:
        """Returns in words what the maps show, for those who do not see them."""
        away = float(abs(self.polynomial - self.softmax).max())
        negative = 100.0 * float((self.polynomial < 0.0).mean())
        return (
            f"{self.title}: attention weights of softmax and of the polynomial for {self.softmax.shape[0]} queries and "
            f"{self.softmax.shape[1]} keys. The largest difference is {away:.3g}; {negative:.1f} % of the polynomial's "
            "weights are negative."
        )


@styled
def draw_maps(maps: AttentionMap) -> Any:
    """Returns a figure of three panels: softmax, polynomial, polynomial − softmax; negative weights are vermilion.

    Where the keys are patches of a picture the maps lie over it, and show the mean over the query rows.
    """
    if maps.picture is not None and maps.grid is not None:
        return _over_picture(maps)
    count = max(maps.softmax.shape)
    side = min(max(2.6, 0.24 * count), 5.2)
    figure, (panels,) = canvas(1, 3, 3 * side + 2.4, side + 0.9)
    highest = max(float(abs(maps.softmax).max()), float(abs(maps.polynomial).max()), 1e-12)
    for panel, (name, weights, scale) in zip(panels, _panels(maps, highest), strict=True):
        shown = panel.imshow(weights, cmap=signed_colors(), vmin=-scale, vmax=scale, interpolation="none")
        panel.grid(False)
        _name_tokens(panel, maps)
        panel.set_title(name)
        _colour_bar(figure, shown, panel, weights)
    figure.suptitle(f"{maps.title} · rows are queries, columns keys; vermilion is negative")
    return figure


def _panels(maps: AttentionMap, highest: float) -> list[tuple[str, Any, float]]:
    difference = maps.polynomial - maps.softmax
    own = max(float(abs(difference).max()), 1e-12)
    return [
        ("softmax", maps.softmax, highest),
        ("polynomial", maps.polynomial, highest),
        ("difference", difference, own),
    ]


def _name_tokens(panel: Any, maps: AttentionMap) -> None:
    if maps.keys and len(maps.keys) <= _LABELLED:
        panel.set_xticks(range(len(maps.keys)), maps.keys, rotation=90, fontsize=8, parse_math=False)
    if maps.rows and len(maps.rows) <= _LABELLED:
        panel.set_yticks(range(len(maps.rows)), maps.rows, fontsize=8, parse_math=False)


def _colour_bar(figure: Any, shown: Any, panel: Any, weights: Any) -> None:
    bar = figure.colorbar(shown, ax=panel, fraction=0.046, pad=0.03)
    low, high = shown.get_clim()
    bar.ax.set_ylim(0.0 if weights.min() >= 0.0 else low, high)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _over_picture(maps: AttentionMap) -> Any:
    down, across = maps.grid or (1, 1)
    height, width = maps.picture.shape[:2]
    figure, grid = canvas(2, 2, 8.0, 8.8)
    figure.get_layout_engine().set(h_pad=0.12, hspace=0.03)
    panels = grid.ravel()
    panels[0].imshow(maps.picture)
    panels[0].set_title("the picture")

    def patches(weights: Any) -> Any:
        return weights.mean(0)[-down * across :].reshape(down, across)

    shown = (patches(maps.softmax), patches(maps.polynomial))
    highest = max(float(abs(weights).max()) for weights in shown)
    for panel, (name, weights, scale) in zip(panels[1:], _panels(maps, highest), strict=True):
        own = patches(weights)
        scale = max(float(abs(own).max()), 1e-12) if name == "difference" else scale
        panel.imshow(0.45 + 0.55 * maps.picture.mean(-1), cmap="gray", vmin=0.0, vmax=1.0)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        strength = (abs(own) / scale) ** 0.7
        panel.imshow(
            own, cmap=_strong(), vmin=-scale, vmax=scale, alpha=strength, extent=extent, interpolation="nearest"
        )
        panel.set_title(f"{name}, up to {float(abs(own).max()):.2g}")
    for panel in panels:
        panel.set_axis_off()
    whose = "of one query" if len(maps.softmax) == 1 else "mean over the queries"
    figure.suptitle(f"{maps.title} · {whose}; vermilion is negative")
    return figure


def _strong() -> Any:
    """Returns the two colours without the white between them: strength is how much of the picture they cover."""
    from matplotlib.colors import ListedColormap

    return ListedColormap([NEGATIVE, signed_colors()(1.0)])
