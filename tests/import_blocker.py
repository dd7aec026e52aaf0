"""Code for a new interpreter in which a package cannot be imported, as where it is not installed."""


def without(package: str) -> str:
    """Returns the code, to be run before any import of the package."""
    return f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ImportError("{package} is blocked")

sys.meta_path.insert(0, Blocker())
"""
