"""The polynomial attention operator. It knows tensors only, nothing of Transformers.

Imports `errors` and `spec`. Other rooms come for `polynomial_attention` and `score_moments`; backends never import one
another.
"""

from .api import polynomial_attention
from .backends import BACKENDS
from .masks import packed_ranges
from .moments import score_moments

__all__ = ["BACKENDS", "packed_ranges", "polynomial_attention", "score_moments"]
