"""The error that a kernel may make."""

from __future__ import annotations

import torch
from torch import Tensor


def excess(candidate: Tensor, same_dtype: Tensor, oracle: Tensor, dtype: torch.dtype | None = None) -> float:
    """Returns the candidate's error over its budget; at most 1 is within.

    The budget is twice the error that the reference makes in the same dtype, plus one unit in the last place of
    the values, in the candidate's dtype or another. Sizes are those of the largest element, and root mean squares where
    there are too few elements (coefficients) for the largest error to be more than luck.
    """

    def size(tensor: Tensor) -> float:
        return float(tensor.abs().max() if tensor.numel() > 1000 else tensor.square().mean().sqrt())

    error, allowed = size(candidate.double() - oracle), 2 * size(same_dtype.double() - oracle)
    allowed += torch.finfo(dtype or candidate.dtype).eps * size(oracle)
    return 0.0 if error == 0.0 else error / allowed
