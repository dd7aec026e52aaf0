"""Every shipped configuration compiles for its devices without spilling, and fits them. No GPU is needed.

By default a choice is compiled. POLYATTN_COMPILE=rows compiles each row of the tables, with the spec that has the most
registers and with the monomial (a quarter of an hour of one core); POLYATTN_COMPILE=all each spec (more than an hour).
A row of two chunks is compiled at the head dim whose second chunk is the least, and where that is held, the largest.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_compilation import SPECS, compiling_for, make_call, run_all, run_layer

from hf_polyattn.ops.call import Call
from hf_polyattn.ops.triton.tuning import SHARED_MEMORY, Configuration, row_of, shipped_tables

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, which the interpreter does not"
)

CAPABILITIES = (*SHARED_MEMORY, 89)
TABLES = {capability: capability for capability in SHARED_MEMORY} | {89: 86}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Case = tuple[int, torch.dtype, str, int, bool]  # capability, dtype, spec, head dim, causal

CHOICE: list[Case] = [
    # of all specs, the one with the most registers
    *((capability, BF16, "poly6-l1", 128, True) for capability in (80, 90, 100, 120)),
    *((capability, BF16, "poly6-l1", 64, True) for capability in (86, 90)),
    (80, FP16, "poly6-l1", 256, True),
    (80, FP32, "poly3^16-l1", 64, True),  # the least shared memory, the widest elements
    (90, BF16, "poly3", 128, False),
    (90, BF16, "poly3-calibrated", 64, False),
    (80, BF16, "poly6-l1", 160, False),  # two chunks
    (90, BF16, "poly6-l1", 80, False),
    *((capability, FP32, "poly6-l1", 96, True) for capability in (86, 120)),
]
ALL: list[Case] = [
    (capability, dtype, spec, dim, causal)
    for capability in CAPABILITIES
    for dtype in (BF16, FP16, FP32)
    for dim in (64, 80, 128, 160, 256)
    for spec in SPECS
    for causal in (True, False)
]
ALL.append((90, BF16, "poly4-l1", 96, True))
ALL += [
    (capability, dtype, spec, dim, causal)
    for capability in (86, 120)
    for dtype in (BF16, FP16, FP32)
    for dim in (96, 192)
    for spec in ("poly6-l1", "poly3")
    for causal in (True, False)
]
ROWS = [case for case in ALL if case[2] in ("poly6-l1", "poly3") and case[4]]
# Rows that spill and are shipped all the same: timed on an H200, they were by far faster than any that does not.
FASTER = {(90, "grad_key_value", Configuration(32, 64, 4, 3))}
CASES = {"choice": CHOICE, "rows": ROWS, "all": ALL}[os.environ.get("POLYATTN_COMPILE", "choice")]


def name(case: Case) -> str:
    capability, dtype, spec, dim, causal = case
    return f"sm{capability}-{str(dtype).removeprefix('torch.')}-{spec}-D{dim}{'-causal' if causal else ''}"


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels say nothing of their registers when they come from a cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def shipped(capability: int) -> Any:
    from hf_polyattn.ops.triton.layout import table_keys

    table = shipped_tables()[TABLES[capability]]

    def configuration(kernel: str, call: Call) -> Configuration:
        return row_of(table, kernel, table_keys(call))

    return configuration


@pytest.mark.parametrize("case", CASES, ids=map(name, CASES))
def test_shipped_configurations_compile_without_spills(case: Case) -> None:
    capability, dtype, spec, dim, causal = case
    with compiling_for(capability, shipped(capability)) as compiled:
        run_all(make_call(head_dim=dim, dtype=dtype, causal=causal, **SPECS[spec]))
    with compiling_for(capability, shipped(capability), ("grad_key_value", "decode")) as grouped:
        run_all(make_call(head_dim=dim, dtype=dtype, causal=causal, heads=(16, 4), **SPECS[spec]))
    kernels = {"forward", "grad_query", "grad_key_value", "decode", "decode_sum"}
    assert {resources.kernel for resources in compiled} == kernels | ({"delta"} if "l1" in spec else set())
    for resources in (*compiled, *grouped):
        assert resources.spilled == 0 or (capability, resources.kernel, resources.configuration) in FASTER, resources
        assert resources.shared <= SHARED_MEMORY[TABLES[capability]], resources
        assert not resources.serialized, resources
        assert 0 < resources.registers < 256, resources
        if resources.kernel == "forward":
            expected = "fma" if dtype == FP32 else {90: "wgmma", 100: "tcgen05"}.get(capability, "mma")
            assert resources.products == expected, resources


def test_spills_and_large_tiles_are_noticed() -> None:
    call = make_call(head_dim=128, **SPECS["poly6-l1"])
    with compiling_for(90, lambda kernel, call: Configuration(128, 128, 8, 3), ("grad_key_value",)) as compiled:
        run_all(call, decode=False)
    assert compiled[0].spilled > 0
    assert compiled[0].shared > SHARED_MEMORY[80]


def test_the_limit_of_registers_reaches_the_compiler() -> None:
    def registers(limit: int | None) -> int:
        row = Configuration(64, 64, 4, 2, limit)
        with compiling_for(80, lambda kernel, call: row, ("forward",)) as compiled:
            run_all(make_call(head_dim=64, **SPECS["poly6-l1"]), decode=False)
        return compiled[0].registers

    assert registers(64) <= 64 < registers(None) <= registers(255)


MASKS: dict[str, dict[str, Any]] = {
    "packed": {"ranges": True, "causal": True},
    "window": {"window": 512, "causal": True},
    "odd-lengths": {"lengths": (4001, 3999)},
    "dropout": {"dropout": 0.1},
    "asymmetric": {"head_dim": 80, "value_dim": 32},
}


@pytest.mark.parametrize("mask", MASKS)
def test_other_calls_compile(mask: str) -> None:
    """These may spill: their masks and random words need registers that the tables do not set aside."""
    settings = {**SPECS["poly3"], **MASKS[mask]}
    with compiling_for(90, shipped(90)) as compiled:
        run_all(make_call(**settings))
    assert len(compiled) == 5
    assert all(resources.shared <= SHARED_MEMORY[90] for resources in compiled)
    assert all(resources.spilled < 256 and not resources.serialized for resources in compiled), compiled


# capability, spec, head dim, causal, refinements, and whether the moments are given
LAYERS = [
    (90, "poly3-calibrated", 64, False, 1, False),
    (90, "poly6-l1", 128, True, 0, True),
    (80, "poly3-calibrated", 128, True, 2, False),
    (86, "poly3-calibrated", 64, False, 0, False),
]


@pytest.mark.parametrize(("capability", "spec", "dim", "causal", "refinements", "given"), LAYERS, ids=str)
def test_modules_with_a_row_shift_compile(
    capability: int, spec: str, dim: int, causal: bool, refinements: int, given: bool
) -> None:
    """Looks at the keys come before the loop that the tables are for, and may spill a little."""
    with compiling_for(capability, shipped(capability)) as compiled:
        run_layer(make_call(head_dim=dim, causal=causal, **SPECS[spec]), refinements=refinements, given=given)
    refined = ["row_sum", "step"] * refinements
    kernels = ["forward", "products", "predict", *refined, "decode", "decode_sum"]
    assert [resources.kernel for resources in compiled] == kernels
    for resources in compiled:
        assert resources.spilled < 256, resources
        assert resources.shared <= SHARED_MEMORY[TABLES[capability]], resources
        assert not resources.serialized, resources
