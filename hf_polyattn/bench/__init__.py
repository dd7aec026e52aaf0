"""Times polynomial attention next to softmax on this machine: `run` is `polyattn bench`.

Imports `adaptation` and below, and `examples`.
"""

from .command import PARTS, USUAL, redraw, run

__all__ = ["PARTS", "USUAL", "redraw", "run"]
