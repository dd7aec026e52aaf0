"""Where this package keeps what it builds and measures on a machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """Returns hf_polyattn's folder in the user's cache: $XDG_CACHE_HOME, or .cache in the home folder.

    A user without a home, as in a container that was given a number for a user, has a folder in the system's temporary
    one, which nobody else may write to.

    Raises:
        PermissionError: there is no home, and that folder is somebody else's.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(root or Path.home() / ".cache") / "hf_polyattn"
    except RuntimeError:  # neither $HOME nor an entry in the list of users
        return _temporary_folder()


def _temporary_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"hf_polyattn-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink():
        raise PermissionError(f"{folder} is not a folder that only this user can write to")
    return folder
