"""The polynomial attention operator. It knows tensors only, nothing of Transformers."""

from .api import polynomial_attention
from .backends import BACKENDS

__all__ = ["BACKENDS", "polynomial_attention"]
