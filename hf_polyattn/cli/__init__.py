"""The command line, `polyattn`. Models are local folders or Hub ids, data sets too; a saved model is whole or absent.

Imports any room, each inside the command that needs it. `__main__` comes for `main`.
"""

from .program import app, main

__all__ = ["app", "main"]
