"""The benchmark verifies what it times and writes what it measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_polyattn import bench

SMALL = {"cpu": (bench.Case(2, 4, 2, 33, 16, True), bench.Case(1, 2, 2, 40, 8, False))}


def test_bench_writes_ratios_of_verified_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(bench, "CASES", SMALL)
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--repeats", "2", "--output", str(tmp_path)])
    bench.main()
    results = json.loads((tmp_path / "bench.json").read_text())
    assert len(results["rows"]) == 2 * len(bench.SPECS)
    for row in results["rows"]:
        assert row["forward"]["speedup"] == pytest.approx(row["forward"]["softmax_ms"] / row["forward"]["ms"], rel=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert "B2-H4/2-T33-D16-causal" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["causal", "normalizer", "coefficients"])
def test_bench_refuses_to_time_a_wrong_backend(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_polyattn.ops import chunked

    correct: Callable[[Any], Any] = chunked.forward

    def wrong(call: Any) -> Any:
        import dataclasses

        changes = {"causal": False, "normalizer": "mean", "coefficients": call.coefficients * 1.01}
        return correct(dataclasses.replace(call, **{part: changes[part]}))

    monkeypatch.setattr(bench, "CASES", {"cpu": SMALL["cpu"][:1]})
    monkeypatch.setattr(chunked, "forward", wrong)
    with pytest.raises(bench.VerificationError, match="exceeds the budget"):
        bench.bench("cpu", torch.float32, "chunked", 1)
