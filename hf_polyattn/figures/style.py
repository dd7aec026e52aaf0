"""The one style: colours that colour-blind people tell apart, on white, so that a picture reads in light and dark.

As SVG a figure has no ground of its own and its ink is `currentColor`: set into a page it takes the page's colours.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ..files import written_beside

P = ParamSpec("P")
R = TypeVar("R")

#: Text, axes, and softmax, which is what everything is compared with.
INK = "#3b4048"
#: Of what is compared with softmax, in this order: blue, vermilion, green, purple, sky and orange of Okabe and Ito.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
POSITIVE, NEGATIVE = SERIES[0], SERIES[1]
GRID = "#9aa0a6"

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.dpi": 110,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.size": 9.5,
    "grid.alpha": 0.3,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "patch.linewidth": 0,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 9,
    "ytick.color": INK,
    "ytick.labelsize": 9,
}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Lets a function draw in this style, whatever matplotlib is set to elsewhere."""

    @wraps(draw)
    def drawing(*args: P.args, **kwargs: P.kwargs) -> R:
        from cycler import cycler
        from matplotlib import rc_context

        with rc_context({**_STYLE, "axes.prop_cycle": cycler(color=SERIES)}):
            return draw(*args, **kwargs)

    return drawing


def canvas(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """Returns a figure and its axes, a (rows, columns) array.

    It belongs to no window, so nobody has to close it, and shows itself in notebooks.

    Args:
        rows, columns: of axes.
        width, height: of the figure, inches.
        **options: of matplotlib's `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = lambda: _bytes(figure, "png", 100)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def color_of(number: int) -> str:
    """Returns the colour of the so-and-so-manieth thing that is compared with softmax."""
    return SERIES[number % len(SERIES)]


def signed_colors() -> Any:
    """Returns the colour map of numbers around 0: vermilion below, white, blue above."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("signed", (NEGATIVE, "#ffffff", POSITIVE))


def plain_numbers(axis: Any) -> None:
    """Labels a logarithmic axis with 1, 2 and 5 times powers of ten, written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Any, axes: Any, columns: int = 4, **options: Any) -> None:
    """Puts the legend of one axes under the whole figure, where it lies on nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), **options)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure, in the format of the suffix (PNG without one): whole or not at all, the same bytes each time."""
    kind = Path(path).suffix[1:] or "png"
    with written_beside(path) as partial:
        partial.write_bytes(_bytes(figure, kind))


def svg(figure: Any, description: str) -> str:
    """Returns a figure as an SVG element for a page: its ground is the page's, its ink the page's text colour.

    Args:
        figure: of `draw_…`.
        description: what it shows, for those who do not see it.
    """
    from html import escape
    from xml.etree import ElementTree

    text = _bytes(figure, "svg").decode()
    drawing = text[text.index("<svg") :].replace(INK, "currentColor")
    opening = drawing.index(">")
    label = escape(description, quote=True)
    drawing = f'<svg role="img" aria-label="{label}"{drawing[4:opening]}{drawing[opening:]}'
    ElementTree.fromstring(drawing)
    return drawing


def _bytes(figure: Any, kind: str, dpi: int = 150) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    fixed = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}.get(kind)
    salt = {"svg.fonttype": "none", "svg.hashsalt": str(id(figure)) if kind == "svg" else None}
    with rc_context(salt):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=fixed, transparent=kind == "svg")
    return buffer.getvalue()
