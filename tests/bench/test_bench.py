"""The benchmark verifies what it times and writes what it measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_polyattn import cli
from hf_polyattn.bench import calibration, command, decoding
from hf_polyattn.bench.cases import CASES, SPECS, Case
from hf_polyattn.bench.models import MODELS, _bert, _vit
from hf_polyattn.bench.operator import time_cases
from hf_polyattn.bench.verification import VerificationError
from hf_polyattn.errors import InputError

SMALL = (Case(2, 4, 2, 33, 16, True), Case(1, 2, 2, 40, 8, queries=1))
TINY = {"tiny": (partial(_bert, 1, 32, 2), ((2, 12), (1, 20))), "tiny-vit": (partial(_vit, 32, 2), ((1, 197),))}

TINY_LANGUAGE = {
    "tiny-gpt2": (partial(decoding._gpt2, 1, 32, 2), (5, 40)),
    "tiny-llama": (partial(decoding._llama, 1, 32, 4, 2), (5,)),
}


def test_bench_writes_ratios_of_verified_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setitem(CASES, "cpu", SMALL)
    monkeypatch.setitem(MODELS, "cpu", TINY)
    monkeypatch.setitem(decoding.MODELS, "cpu", TINY_LANGUAGE)
    options = ["--device", "cpu", "--repeats", "2", "--dtype", "float32", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["polyattn", "bench", *options])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    results = json.loads((tmp_path / "bench.json").read_text())
    assert len(results["rows"]) == 2 * len(SPECS)
    for row in results["rows"]:
        assert ("forward_backward" in row) == (row["queries"] is None)
        times = row["forward"]
        assert times["speedup"] == pytest.approx(times["softmax_ms"]["sdpa"] / times["ms"], rel=0.1)
        assert times["limit_speedup"] > times["speedup"]  # these cases are too small to come near it
    assert {(row["model"], row["length"]) for row in results["models"]} == {
        ("tiny", 12),
        ("tiny", 20),
        ("tiny-vit", 197),
    }
    for row in results["models"]:
        assert row["train"]["latency"] == pytest.approx(row["train"]["ms"] / row["train"]["softmax_ms"], rel=0.1)
    assert [(row["model"], row["cached"], row["spec"]) for row in results["decode"]] == [
        (model, cached, str(spec))
        for model, (_, lengths) in TINY_LANGUAGE.items()
        for cached in lengths
        for spec in SPECS
    ]
    for row in results["decode"]:
        assert row["latency"] == pytest.approx(row["ms"] / row["softmax_ms"], rel=0.1)
    (memory,) = results["memory"]
    assert memory["mib"].keys() == {"sdpa", *map(str, SPECS)}
    weights = 8192**2 * 8 * 4 / 2**20
    assert all(0.0 < peak < 0.2 * weights for peak in memory["mib"].values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png"]
    printed = capsys.readouterr().out
    assert "B2-H4/2-T33-D16-causal" in printed
    assert "B1-H2-T40-D8-q1" in printed


@pytest.mark.parametrize("part", ["causal", "normalizer", "coefficients"])
def test_bench_refuses_to_time_a_wrong_backend(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_polyattn.ops import chunked

    correct: Callable[[Any], Any] = chunked.forward

    def wrong(call: Any) -> Any:
        import dataclasses

        changes = {"causal": False, "normalizer": "mean", "coefficients": call.coefficients * 1.01}
        return correct(dataclasses.replace(call, **{part: changes[part]}))

    monkeypatch.setitem(CASES, "cpu", SMALL[:1])
    monkeypatch.setattr(chunked, "forward", wrong)
    with pytest.raises(VerificationError, match="exceeds the budget"):
        list(time_cases("cpu", torch.float32, "chunked", 1))


def test_bench_measures_a_part_and_keeps_what_it_had_when_cut_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cut_off(*args: Any) -> Any:
        yield [{"case": "first"}]
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "time_cases", cut_off)
    with pytest.raises(KeyboardInterrupt):
        command.run("cpu", ["float32"], "auto", 1, tmp_path, parts=["operator"])
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [results[key] for key in command.PARTS.values()] == [[{"case": "first"}], [], [], [], []]
    with pytest.raises(
        InputError, match=r"parts must be of \['operator', 'models', 'decode', 'memory', 'calibration'\], got"
    ):
        command.run("cpu", ["float32"], "auto", 1, tmp_path, parts=["speed"])


def test_a_step_decodes_after_the_same_cache_each_time() -> None:
    model, seen = decoding._llama(1, 32, 4, 2, 50).eval(), []
    step = decoding._step(model, 40)
    model.register_forward_hook(
        lambda _, __, inputs, output: seen.append((inputs["input_ids"].shape, output.past_key_values.get_seq_length())),
        with_kwargs=True,
    )
    step()
    step()
    assert [(tuple(shape), length) for shape, length in seen] == [((1, 1), 41)] * 2


def tiny_demo() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    return _bert(1, 32, 2).eval(), [{"input_ids": torch.randint(5, 1000, (4, 40))} for _ in range(2)]


def test_bench_times_calibration_in_passes_of_softmax(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(calibration, "demo", tiny_demo)
    command.run("cpu", ["float32"], "auto", 2, tmp_path, parts=["calibration"])
    rows = json.loads((tmp_path / "bench.json").read_text())["calibration"]
    assert [row["spec"] for row in rows] == [*calibration.SPECS]
    for row in rows:
        assert row["rows"] == 2 * 4 * (40 + 2 * 20)  # halves of the texts too
        assert row["passes"] == pytest.approx(row["ms"] / row["softmax_ms"], rel=0.1)
        assert row["passes"] > 1.0
    assert "in passes of softmax" in capsys.readouterr().out


def test_bench_refuses_to_time_a_calibration_that_does_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(model: Any, batches: Any, **options: Any) -> Any:
        report = correct(model, batches, **options)
        for name, tensor in model.state_dict().items():
            if name.endswith("polyattn.coefficients"):
                tensor.mul_(1.0 + 1e-3 * torch.rand(()))
        return report

    correct = calibration.calibrate
    monkeypatch.setattr(calibration, "demo", tiny_demo)
    monkeypatch.setattr(calibration, "calibrate", moved)
    with pytest.raises(VerificationError, match="a repeat of the calibration differs"):
        list(calibration.time_calibration("cpu", torch.float32, 1))


def test_the_part_calibration_names_the_package_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "calibration" not in command.USUAL
    monkeypatch.setattr(calibration, "_PACKAGE", "no-such-package")
    with pytest.raises(InputError, match="pip install --no-deps no-such-package"):
        calibration.demo()
