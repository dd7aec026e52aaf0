"""Compiles the kernels of backend `triton` for a device that is not there, and reads what ptxas says of them."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hf_polyattn.ops.call import Call
from hf_polyattn.ops.triton.tuning import Configuration

SPECS: dict[str, dict[str, Any]] = {
    "poly3": {"degree": 3, "monomial": True},
    "poly3-calibrated": {"degree": 3, "interval": True},
    "poly4-l1": {"degree": 4, "normalizer": "l1", "interval": True},
    "poly6-l1": {"degree": 6, "normalizer": "l1", "interval": True},
    "poly3^16-l1": {"degree": 3, "normalizer": "l1", "power": 16, "interval": True},
}


class Resources(NamedTuple):
    """What one compiled kernel needs.

    Attributes:
        spilled: bytes stored and loaded because registers did not suffice.
        shared: bytes of shared memory of one program.
        serialized: whether ptxas could not overlap wgmma instructions.
        products: the instruction that multiplies matrices: tcgen05, wgmma, mma or fma.
    """

    kernel: str
    configuration: Configuration
    registers: int
    spilled: int
    shared: int
    serialized: bool
    products: str


class Device:
    """Stands for a CUDA device of a compute capability, as Triton's driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # the key of compiled kernels

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def make_call(
    degree: int,
    *,
    power: int = 1,
    normalizer: str = "rsqrt",
    monomial: bool = False,
    interval: bool = False,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    lengths: tuple[int, int] = (4096, 4096),
    heads: tuple[int, int] = (16, 16),
    causal: bool = False,
    window: int | None = None,
    ranges: bool = False,
    dropout: float = 0.0,
) -> Call:
    """A call of tensors without memory, laid out as Transformers does."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    (q_len, k_len), (query_heads, groups) = lengths, heads
    return Call(
        query=empty(2, q_len, query_heads, head_dim).transpose(1, 2),
        key=empty(2, k_len, groups, head_dim).transpose(1, 2),
        value=empty(2, k_len, groups, value_dim or head_dim).transpose(1, 2),
        coefficients=empty(query_heads, degree + 1, dtype=torch.float32),
        mask=None,
        ranges=empty(2, q_len, 2, dtype=torch.int32) if ranges else None,
        center=empty(2, query_heads, q_len, dtype=torch.float32) if interval else None,
        radius=empty(query_heads, dtype=torch.float32) if interval else None,
        seed=empty(1, dtype=torch.int64) if dropout else None,
        causal=causal,
        window=window,
        scaling=head_dim**-0.5,
        power=power,
        normalizer=normalizer,
        clamp=interval,
        monomial=monomial,
        dropout=dropout,
    )


@contextlib.contextmanager
def compiling_for(
    capability: int, configuration: Callable[[str, Call], Configuration], only: tuple[str, ...] = ()
) -> Iterator[list[Resources]]:
    """Within, the backend compiles what it would launch and appends what that needs to the list."""
    from triton import knobs
    from triton.runtime import driver

    from hf_polyattn.ops.triton import layout

    compiled: list[Resources] = []

    def launch(kernel: Any, programs: int, call: Call, tuned: Configuration, *arguments: Any, **static: Any) -> None:
        name = kernel.__name__.removesuffix("_kernel")
        if only and name not in only:
            return
        kernel.device_caches.clear()  # what is compiled before says nothing
        with contextlib.redirect_stdout(io.StringIO()) as log:
            binary = kernel.warmup(*arguments, **static, grid=(programs,), **layout.compile_options(tuned))
        registers = re.findall(r"Used (\d+) registers", log.getvalue())
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
        assert len(registers) == len(spills) == 1, f"no information from ptxas on {name}: {log.getvalue()!r}"
        compiled.append(
            Resources(
                name,
                tuned,
                int(registers[0]),
                sum(map(int, spills[0])),
                binary.metadata.shared,
                "serialized" in log.getvalue(),
                next((name for name in ("tcgen05", "wgmma", "mma") if f"{name}." in binary.asm["ptx"]), "fma"),
            )
        )

    with pytest.MonkeyPatch.context() as patch, knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        patch.setattr(layout, "launch", launch)
        patch.setattr(layout, "configuration_of", configuration)
        active = driver._active
        driver.set_active(Device(capability))
        try:
            yield compiled
        finally:
            driver._active = active


def run_all(call: Call, *, decode: bool = True) -> None:
    """Runs forward, backward and decode of a call on meta tensors, so that `compiling_for` sees their kernels."""
    from hf_polyattn.ops.triton import launch as backend

    output, row_scale = backend.forward(call)
    backend.backward(output, output, row_scale, call, coefficients_grad=True, center_grad=True)
    if decode:
        center = None if call.center is None else call.center[:, :, :1]
        backend.forward(replace(call, query=call.query[:, :, :1], center=center, causal=False, ranges=None))


def run_layer(call: Call, *, refinements: int, squares: int = 8, given: bool = False) -> None:
    """Runs the forward pass of a module on meta tensors, of all rows and of one, with moments and refinements."""
    from hf_polyattn.ops.triton import launch as backend
    from hf_polyattn.ops.triton.arguments import Refinement, Shift

    heads, head_dim, count = call.query.shape[1], call.query.shape[3], call.coefficients.shape[1]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    rows = {} if not given else {name: empty(*call.query.shape[:3]) for name in ("mean", "variance")}
    features = {name: empty(heads, 8 + squares) for name in ("weights", "means", "scales")}
    parts = [Refinement(empty(heads, count), empty(heads), empty(heads), empty(heads, 5)) for _ in range(refinements)]
    shift = Shift(
        empty(heads, head_dim), **features, length_shift=empty(heads, head_dim),
        squares=empty(heads, squares, head_dim), lengths=empty(2), **rows,
        **dict(zip(("first", "second"), parts, strict=False)),
    )  # fmt: skip
    call = replace(call, center=empty(heads)[None, :, None].expand(call.query.shape[:3]))
    backend.forward(call, shift)
    one = replace(call, query=call.query[:, :, :1], center=call.center[:, :, :1], causal=False, ranges=None)
    backend.forward(one, shift)
