"""`hp.plot`: `dial`, `heads`, `maps` and `norms`, for notebooks; each takes a model or a report and returns a figure.

Nothing is drawn here: `seen` takes from a model what a picture shows, `pictures` hands it to `figures`, which draws
plain data and stands below the rooms that measure. Needs matplotlib.
"""

from .pictures import dial, heads, maps, norms

__all__ = ["dial", "heads", "maps", "norms"]
