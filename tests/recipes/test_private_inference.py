"""The recipe for private inference: a checkpoint that SPU's parties run, and what it refuses to share."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipe_runs import ROOT, environment
from safetensors.numpy import load_file, save_file

import hf_polyattn as hp

REQUIREMENTS = "recipes/requirements-private.txt"
ARMS = ("softmax", "poly3~1", "poly3 clamp-free", "poly3^4-l1 clamp-free")


@pytest.fixture(scope="module")
def spu_python() -> str:
    """The interpreter that has SPU: of `make private`'s environment, or this one."""
    python = ROOT / ".venv-private" / "bin" / "python"
    if python.exists():
        return str(python)
    if find_spec("spu") is None:
        pytest.skip(f"needs the package spu: `make private`, or pip install -r {REQUIREMENTS} into .venv-private")
    return sys.executable


def call(python: str, *words: Any) -> subprocess.CompletedProcess[str]:
    command = [python, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment(), timeout=170
    )


def succeed(python: str, *words: Any) -> str:
    done = call(python, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def molecules(
    checkpoint: Callable[[str], Path], shared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A layer of gpt2-zinc, prepared."""
    output = tmp_path_factory.mktemp("private") / "molecules"
    words = ["prepare", "--output_dir", output, "--model", checkpoint("gpt2-zinc"), "--layers", 1, "--samples", 1]
    words += ["--data", shared("datasets/zinc/train.parquet"), "--sequences", 4, "--distill_steps", 0]
    succeed(sys.executable, "recipes/private_inference.py", *words, "--arms", *ARMS)
    return output


def test_parties_compute_what_the_model_does(spu_python: str, molecules: Path) -> None:
    """In plain text JAX is PyTorch for every arm; among two parties next-token losses are those of plain text."""
    words = ["run", "--output_dir", molecules, "--protocols", "SEMI2K", "--repeats", 1, "--arms"]
    succeed(spu_python, "recipes/private_inference.py", *words, *ARMS)
    results = json.loads((molecules / "private.json").read_text())
    assert results["plain_error"].keys() == set(ARMS)
    assert max(results["plain_error"].values()) < 1e-4
    assert len({case["plain_nll"] for case in results["cases"] if "whole" in case}) == len(ARMS)  # arms differ
    for case in results["cases"]:
        if "whole" in case:
            assert case["nll"] == pytest.approx(case["plain_nll"], rel=0.01)
            assert case["whole"]["bytes_sent"] > 0
        else:
            assert case["error"] < 0.01
    rounds = {case["arm"]: case["attention"]["rounds"] for case in results["cases"] if "attention" in case}
    assert rounds["poly3 clamp-free"] < rounds["poly3^4-l1 clamp-free"] < rounds["softmax"]
    assert 3 * rounds["poly3 clamp-free"] < rounds["softmax"]
    printed = succeed(sys.executable, "recipes/private_inference.py", "report", "--output_dir", molecules)
    assert "`poly3 clamp-free`" in printed
    assert (molecules / "private.png").stat().st_size > 0


SENTENCES = ("softmax", "poly3", "poly3 clamp-free")


def test_an_encoder_is_the_same_in_jax(spu_python: str, tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    """Twelve heads, in products of six, and a cubic in powers of the raw scores; trained, and float32 again."""
    words = ["--output_dir", tmp_path / "out", "--arms", *SENTENCES]
    of_model = ["--model", checkpoint("minilm"), "--layers", 1, "--lengths", 13, "--sequences", 2]
    of_model += ["--distill_steps", 2, "--learning_rate", 1e-5]
    succeed(sys.executable, "recipes/private_inference.py", "prepare", *words, *of_model)
    run = ["--protocols", "ABY3", "--repeats", 1, "--whole_repeats", 0, "--loopback", "SEMI2K"]
    succeed(spu_python, "recipes/private_inference.py", "run", *words, *run)
    results = json.loads((tmp_path / "out/private.json").read_text())
    assert max(results["plain_error"].values()) < 1e-4
    assert max(case["error"] for case in results["cases"]) < 0.01
    for processes in (None, True):
        arms = [case["arm"] for case in results["cases"] if case.get("processes") == processes]
        assert arms == ["softmax", "jax.nn.softmax", "products alone", "poly3", "poly3 clamp-free"]


def test_a_run_that_is_cut_off_keeps_what_it_has(spu_python: str, molecules: Path, tmp_path: Path) -> None:
    shutil.copytree(molecules, tmp_path / "out", ignore=shutil.ignore_patterns("private.*"))
    words = ["run", "--output_dir", tmp_path / "out", "--protocols", "SEMI2K", "--arms", *ARMS]
    command = [spu_python, "recipes/private_inference.py", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.kill()
    cases = json.loads((tmp_path / "out/private.json").read_text())["cases"]
    assert cases[0] == first
    assert 1 <= len(cases) < len(ARMS)


BY_HEAD = """
import sys
sys.path[:0] = ["recipes", "."]
from private.attention import HEADS_AT_ONCE, by_head
import numpy as np
HEADS_AT_ONCE = HEADS_AT_ONCE["short"]
rows, columns = np.random.default_rng(0).normal(size=(2, 8, 5, 5)).astype(np.float32)
for heads in (1, HEADS_AT_ONCE, HEADS_AT_ONCE + 2):
    found = by_head(rows[:heads].transpose(1, 0, 2)[:3], columns[:heads, :, :4])
    wanted = np.einsum("htk,hkn->thn", rows[:heads, :3], columns[:heads, :, :4])
    print(found.shape == wanted.shape, *(np.abs(found - x).max() < 1e-5 for x in (wanted, wanted[:, ::-1])))
"""


def test_products_of_several_heads_are_those_of_each(spu_python: str) -> None:
    """A group of heads, and one that is not full; heads in another order are not the same."""
    one, *more = succeed(spu_python, "-c", BY_HEAD).splitlines()
    assert one == "True True True"
    assert more == ["True True False"] * 2


TOO_LARGE = """
import sys
sys.path[:0] = ["recipes", "."]
from private.ranges import RangeError, check
import jax, numpy as np
x = np.full((2, 3), 40.0, np.float32)
softly = lambda x: jax.jit(lambda y: (y @ y.T) ** 3)(x)
print(check("fine", "FM128", 18, softly, x))
try:
    check("attention", "FM64", 18, softly, x)
except RangeError as error:
    print(error)
"""


def test_values_that_the_ring_cannot_hold_are_one_clear_line(spu_python: str) -> None:
    fine, error = succeed(spu_python, "-c", TOO_LARGE).splitlines()
    assert float(fine) == pytest.approx(4800.0**3)
    assert error.startswith("attention reaches 1.11e+11 in a integer_pow, and FM64 with 18 fractional bits holds")
    assert error.endswith("Take --field FM128, or fewer --fraction_bits.")


def test_the_page_has_the_measured_tables() -> None:
    reporting = importlib.import_module("private.reporting")
    text = (ROOT / "docs/private_inference.md").read_text()
    tables = reporting.tables(json.loads((ROOT / "benchmarks/private.json").read_text()))
    assert reporting.page(text, tables) == text
    assert all(f"<!-- {name} -->" in text for name in tables)
    with pytest.raises(hp.InputError, match="the page has no <!-- depths -->"):
        reporting.page("no table", tables)


def case(arm: str, seconds: float, **more: Any) -> dict[str, Any]:
    cost = {"seconds": seconds, "bytes_sent": 10**6, "rounds": 100}
    return {"arm": arm, "protocol": "ABY3", "tokens": 8, "sample": 0, "attention": cost} | more


def test_networks_are_computed_from_bytes_and_messages() -> None:
    """8 Mbit and 100 messages: 8 ms and 50 ms in a LAN, 80 ms and 2 s in a WAN."""
    reporting = importlib.import_module("private.reporting")
    cost = case("softmax", 0.1)["attention"]
    assert reporting.over("LAN", cost) == pytest.approx(0.158)
    assert reporting.over("WAN", cost) == pytest.approx(2.18)
    slow, fast = reporting.rows_of({"cases": [case("softmax", 0.1), case("poly3", 0.021)]}, "attention")
    assert slow[-2:] == ("0.16 (1.0 ×)", "2.18 (1.0 ×)")
    assert fast[-2:] == ("0.08 (2.0 ×)", "2.10 (1.0 ×)")


def test_a_run_is_added_to_what_it_does_not_measure_again() -> None:
    added = importlib.import_module("private_inference").added
    plain = {"field": "FM64", "plain_error": {"softmax": 1e-5}}
    before = plain | {"cases": [case("softmax", 1.0), case("poly3", 1.0), case("softmax", 1.0, processes=True)]}
    results = {"field": "FM64", "plain_error": {"poly4": 2e-5}, "cases": [case("softmax", 2.0)]}
    together = added(before, results)
    assert together["cases"] == [case("softmax", 1.0, processes=True), case("softmax", 2.0)]
    assert together["plain_error"] == {"softmax": 1e-5, "poly4": 2e-5}
    with pytest.raises(hp.PolyAttnError, match="--add: field changed since the earlier run; measure all anew"):
        added(before, results | {"field": "FM128"})


# ---------------------------------------------------------------- what is refused, without SPU


@pytest.fixture
def prepare(checkpoint: Callable[[str], Path]) -> Callable[..., None]:
    recipe = importlib.import_module("private_inference")

    def prepare(model: str, *words: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                sys, "argv", ["private_inference.py", "prepare", "--model", *map(str, (checkpoint(model), *words))]
            )
            recipe.prepare(recipe.arguments())

    return prepare


def test_texts_that_cannot_be_had_are_named(prepare: Any, shared: Callable[[str], Path]) -> None:
    with pytest.raises(hp.PolyAttnError, match=r"--lengths \[16, 513\]: .* takes 1 to 512 tokens"):
        prepare("minilm", "--lengths", 16, 513)
    with pytest.raises(hp.PolyAttnError, match="the sentences are too few for 3000 sequences of 8 tokens"):
        prepare("minilm", "--lengths", 16, "--sequences", 3000)
    with pytest.raises(hp.PolyAttnError, match=r"has no column 'text'; --column one of \['sentence', 'label'\]"):
        prepare("gpt2-zinc", "--data", shared("datasets/sst2/test.parquet"))
    with pytest.raises(hp.PolyAttnError, match=r"the first of --arms is softmax, .*; got \['poly3'\]"):
        prepare("minilm", "--arms", "poly3")


@pytest.fixture
def read() -> Callable[[Path], Any]:
    read_checkpoint: Callable[[Path], Any] = importlib.import_module("private.checkpoint").read_checkpoint
    return read_checkpoint


def test_a_class_that_it_does_not_have_is_named(read: Any, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(hp.InputError, match="is a LlamaForCausalLM; private inference has BertModel, GPT2LMHeadModel"):
        read(checkpoint("llama"))


def test_a_softmax_layer_in_a_polynomial_model_is_named(read: Any, pretrained: Any, tmp_path: Path) -> None:
    model = pretrained("gpt2-zinc", "AutoModelForCausalLM", num_hidden_layers=3)
    model.save_pretrained(tmp_path / "softmax")
    assert read(tmp_path / "softmax").polynomials == (None, None, None)
    hp.patch_model(model, "poly3", layers=[0, 2]).save_pretrained(tmp_path / "mixed")
    with pytest.raises(hp.InputError, match=r"polynomial, but h\.1\.attn is softmax \(1 of 3 layers\): patch every"):
        read(tmp_path / "mixed")


def test_what_it_would_leave_out_is_refused(read: Any, pretrained: Any, tmp_path: Path) -> None:
    model = hp.patch_model(pretrained("gpt2-zinc", "AutoModelForCausalLM", num_hidden_layers=1), "poly3")
    model.save_pretrained(tmp_path)
    found = read(tmp_path)
    assert found.polynomials[0].spec == hp.Polynomial.parse("poly3")
    np.testing.assert_array_equal(found.polynomials[0].tensors["coefficients"], [[0.0, 0.0, 0.0, 1.0]])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))
    with pytest.raises(hp.InputError, match="activation_function='relu'; private inference has 'gelu_new' only"):
        read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.h.0.attn.polyattn.offset"] = np.zeros(1, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(hp.InputError, match=r"h\.0\.attn has 'offset', which private inference does not know"):
        read(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(hp.InputError, match=r"needs config\.json and model\.safetensors"):
        read(tmp_path)
