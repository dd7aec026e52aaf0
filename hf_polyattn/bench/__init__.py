"""Times polynomial attention next to softmax on this machine: `run` is `polyattn bench`.

Imports `patching` and below.
"""

from .command import run

__all__ = ["run"]
