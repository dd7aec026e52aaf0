"""What is timed: shapes, polynomials and dtypes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the key of `DTYPES`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class Case:
    """One timed shape: batch, query heads, key/value heads, queries, keys, head dim, and whether it is causal."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    causal: bool = False
    queries: int | None = None

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        decode = "" if self.queries is None else f"-q{self.queries}"
        return f"B{self.batch}-H{heads}-T{self.length}-D{self.head_dim}{'-causal' if self.causal else ''}{decode}"

    def tensors(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Returns random query, key and value, laid out (B, T, H, D) in memory as Transformers does."""
        lengths = (self.queries or self.length, self.length, self.length)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        return [
            torch.randn(self.batch, length, count, self.head_dim, device=device, dtype=dtype).transpose(1, 2)
            for length, count in zip(lengths, heads, strict=True)
        ]

    @property
    def flops(self) -> float:
        """Multiplications and additions of the two products of a forward pass."""
        pairs = (self.queries or self.length) * self.length * (0.5 if self.causal else 1.0)
        return 4.0 * self.batch * self.heads * pairs * self.head_dim


CASES = {
    "cpu": (
        Case(8, 12, 12, 128, 64),
        Case(4, 12, 12, 512, 64),
        Case(4, 12, 12, 197, 64),
        Case(1, 12, 12, 2048, 64),
        Case(1, 16, 16, 2048, 128),
        Case(1, 8, 2, 4096, 64, causal=True),
        Case(1, 8, 2, 8192, 64, queries=1),
    ),
    "cuda": (
        *(Case(32768 // n, 16, 16, n, 64, causal) for n in (2048, 4096, 16384) for causal in (False, True)),
        *(Case(32768 // n, 16, 16, n, 128, causal) for n in (2048, 4096, 16384) for causal in (False, True)),
        Case(4, 32, 8, 32768, 128, queries=1),
    ),
}


@dataclass(frozen=True, slots=True)
class Spec:
    """A polynomial as a model has it: bare and frozen, or calibrated, with all its parameters trained."""

    spec: str
    calibrated: bool

    def __str__(self) -> str:
        return f"{self.spec}{' calibrated' if self.calibrated else ' bare'}"


SPECS = (Spec("poly3", False), Spec("poly3", True), Spec("poly6-l1", True), Spec("poly3^16-l1", True))
