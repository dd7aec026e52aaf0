"""Every family that uses the attention interface can be patched, and every other one is refused, not half patched.

The checks are in sweep.py, which also writes the table of all families; here a part of them runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import transformers

if not hasattr(transformers.PreTrainedConfig, "sub_configs_defaults"):
    pytest.skip(
        "sweep.py builds tiny configs from `sub_configs_defaults`, of newer Transformers", allow_module_level=True
    )

import family_checks
import sweep

import hf_polyattn as hp
from hf_polyattn.patching import families

TABLE = sweep.read_table()

# At least one of each kind: encoders, decoders, encoder-decoders, experts, latent and linear attention, windows,
# vision, speech, time series, and composites of them.
PATCHED = [
    "albert", "arcee", "bamba", "bart", "beit", "bert", "bert-generation", "biogpt", "blip_2_qformer", "clip",
    "cohere2_moe", "ctrl", "deepseek_v3", "deit", "detr", "dinov2", "dinov3_vit", "distilbert", "electra",
    "encoder-decoder", "esm", "falcon_h1", "gemma3_text", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "hubert",
    "idefics2", "jamba", "layoutlm", "lightglue", "llama", "llama4_text", "mbart", "mistral", "mixtral",
    "mllama_text_model", "modernbert", "olmo2", "opt", "paligemma", "patchtst", "phi3", "pixtral", "qwen2",
    "qwen2_vl", "qwen3", "qwen3_next", "roberta", "sam2_vision_model", "segformer", "smollm3", "starcoder2",
    "time_series_transformer", "videomae", "vision-encoder-decoder", "vit", "vit_mae", "vitpose", "vivit", "wav2vec2",
    "whisper", "xlm-roberta", "yolos",
]  # fmt: skip

HARD_CODED = [name for name, row in TABLE["families"].items() if "hard-coded softmax" in row.get("reason", "")]

# One family for each argument that polynomial attention cannot honour.
UNSUPPORTED = {"gemma2": "softcap", "gpt_oss": "s_aux", "t5": "position_bias"}


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity(verbosity)


def require_table_row(row: sweep.Row) -> None:
    """Compares what was seen with benchmarks/sweep.json, where that is of the same Transformers."""
    if TABLE["transformers"] != transformers.__version__:
        pytest.skip(f"checked; not compared with the table, which is of Transformers {TABLE['transformers']}")
    measured = ("error", "tolerance", "control", "rest")
    rows = (sweep.as_json(row), TABLE["families"][row.family])
    seen, expected = ({name: value for name, value in each.items() if name not in measured} for each in rows)
    assert seen == expected, f"run python tests/sweep.py --write {row.family}"
    assert [each.get("rest") == "passed" for each in rows] in ([True] * 2, [False] * 2)


@pytest.mark.parametrize("family", PATCHED)
def test_patched_family_equals_the_oracle(family: str) -> None:
    row = sweep.sweep_family(family)
    assert row.status == "passed", row.reason
    require_table_row(row)


@pytest.mark.parametrize("family", HARD_CODED)
def test_hard_coded_family_is_refused_and_left_as_it_was(family: str) -> None:
    row = sweep.sweep_family(family)
    assert row.status == "refused", row.reason
    assert "hard-coded softmax" in row.reason
    require_table_row(row)


@pytest.mark.parametrize(("family", "argument"), UNSUPPORTED.items())
def test_unsupported_argument_is_named(family: str, argument: str) -> None:
    row = sweep.sweep_family(family)
    assert row.status == "refused", row.reason
    assert repr(argument) in row.reason
    require_table_row(row)


def test_at_least_sixty_families_pass_and_none_fails() -> None:
    rows = TABLE["families"].values()
    assert [row["family"] for row in rows if row["status"] == "failed"] == []
    assert sum(row["status"] == "passed" for row in rows) >= 60
    assert [row["family"] for row in rows if row["status"] != "passed" and not row.get("reason")] == []


def test_the_table_has_every_family() -> None:
    if TABLE["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of Transformers {TABLE['transformers']}")
    assert sorted(TABLE["families"]) == sorted(sweep.CONFIG_MAPPING)


@pytest.mark.parametrize("part", ["mask", "normalizer"])
def test_an_operator_without_it_fails_the_sweep(
    broken: Callable[[str], AbstractContextManager[None]], part: str
) -> None:
    with broken(part):
        row = sweep.sweep_family("bert")
    assert row.status == "failed"
    assert "differs from the oracle" in row.reason


def test_another_polynomial_fails_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_checks, "SPEC", "poly2")
    row = sweep.sweep_family("gpt2")
    assert row.status == "failed"
    assert "differs from the oracle" in row.reason


def test_a_module_that_silently_stays_softmax_fails_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = families.attention_sites
    for user in ("patch", "description"):
        monkeypatch.setattr(f"hf_polyattn.patching.{user}.attention_sites", lambda model: sites(model)[:-1])
    row = sweep.sweep_family("vit")
    assert row.status == "failed"
    assert "ViTAttention was not found" in row.reason


def test_a_trace_left_by_unpatching_fails_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    unpatch = hp.unpatch_model

    def leave_trace(model: Any) -> Any:
        unpatch(model)
        model.config.attn_implementation = "polyattn"
        return model

    monkeypatch.setattr(hp, "unpatch_model", leave_trace)
    row = sweep.sweep_family("llama")
    assert row.status == "failed"
    assert "does not restore it" in row.reason
