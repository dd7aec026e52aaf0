"""What draws: one style, and the drawing of what other rooms measured, given as plain data. No model comes in here.

matplotlib is imported inside. Other rooms come for `draw_…`, which return a figure, and for `save` and `svg`. With a
model or a report in hand one wants `hp.plot`, the room `plot`, which looks at it and has it drawn here.
"""

from .curves import HeadCurve, draw_curves
from .dial import draw_conversion, draw_fits
from .maps import AttentionMap, draw_maps
from .norms import draw_norms
from .speed import draw_speedups
from .style import save, svg

__all__ = [
    "AttentionMap",
    "HeadCurve",
    "draw_conversion",
    "draw_curves",
    "draw_fits",
    "draw_maps",
    "draw_norms",
    "draw_speedups",
    "save",
    "svg",
]
