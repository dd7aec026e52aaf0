"""A mask of which each row is one range of keys, as a tensor that is the dense mask to whoever asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..ops.masks import within


class RangeMask(Tensor):
    """A bool mask (B, 1, Tq, Tk), True = visible, of which each row is one range of keys.

    It holds the ranges only, and makes the dense mask for any operation on it. An operation that changes it or hands
    out a view of it makes it dense for good.

    Attributes:
        ranges: int32 (B or 1, Tq or 1, 2), start and stop of the keys that a query sees; None once it is dense.
    """

    ranges: Tensor | None
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, ranges: Tensor, q_len: int, k_len: int) -> RangeMask:
        """Makes the mask of `ranges` for `q_len` queries and `k_len` keys."""
        shape = (ranges.shape[0], 1, q_len, k_len)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=ranges.device)
        self.ranges = ranges
        self._dense = None
        return self

    def dense(self) -> Tensor:
        """Returns the plain bool mask."""
        if self._dense is None:
            assert self.ranges is not None
            self._dense = within(self.ranges, slice(0, self.shape[3])).expand(self.shape).contiguous()
        return self._dense

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Runs an operation on the dense mask."""
        aliased = any(argument.alias_info is not None for argument in function._schema.arguments)

        def dense(mask: RangeMask) -> Tensor:
            plain = mask.dense()
            if aliased:
                mask.ranges = None
            return plain

        args, kwargs = tree_map_only(cls, dense, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Returns what torch.compile takes the mask apart into."""
        return ["ranges"] if self.ranges is not None else ["_dense"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, shape: Any, stride: Any) -> Tensor:
        """Returns the mask that `__tensor_flatten__` took apart."""
        return inner["_dense"] if "_dense" in inner else RangeMask(inner["ranges"], shape[2], shape[3])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Returns its shape and ranges."""
        return f"RangeMask(shape={tuple(self.shape)}, ranges={self.ranges})"


def dense_mask(mask: Tensor | None) -> Tensor | None:
    """Returns the mask of a model as a plain tensor."""
    return mask.dense() if isinstance(mask, RangeMask) else mask
