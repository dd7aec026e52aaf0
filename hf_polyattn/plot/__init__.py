"""Pictures for notebooks: `hp.plot.dial`, `heads`, `maps` and `norms`; each returns a figure, in one style.

Imports `figures`, which draws, and what measures: `adaptation` and `diagnosis`. Needs matplotlib.
"""

from .pictures import dial, heads, maps, norms

__all__ = ["dial", "heads", "maps", "norms"]
