"""Times polynomial attention next to softmax on this machine: `run` is `polyattn bench`.

Imports `patching` and below.
"""

from .command import PARTS, redraw, run

__all__ = ["PARTS", "redraw", "run"]
