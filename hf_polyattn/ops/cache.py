"""Where this package keeps what it builds and measures on a machine."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Returns hf_polyattn's folder in the user's cache: $XDG_CACHE_HOME, or .cache in the home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_polyattn"
