"""An exported model runs without this package where its code is trusted, and is refused where it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from import_blocker import without
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_polyattn as hp
from hf_polyattn.cli import app
from hf_polyattn.patching.patched import patched_layers
from hf_polyattn.patching.relative import RelativePolynomial

CONFIGS = {
    "minilm": ("AutoModel", hp.PolyAttentionConfig("poly4-l1", interval=True, clamp=True, key_shift=True)),
    "gpt2-zinc": ("AutoModelForCausalLM", hp.PolyAttentionConfig("poly3", layers=[1, 2], granularity="layer")),
    "llama": (
        "AutoModelForCausalLM",
        hp.PolyAttentionConfig("poly3~2", interval=True, clamp=True, row_shift="moments", squares=3),
    ),
    "vit": ("AutoModelForImageClassification", hp.PolyAttentionConfig("poly3^4-l1", interval=True, clamp=True)),
}
TOLERANCE = 1e-4  # of the largest logit, in float32


@pytest.fixture(scope="module")
def exported(pretrained: Any, polynomial: Any, batch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patched checkpoints of four classes with their code, each with inputs, logits and those of softmax."""
    folder = tmp_path_factory.mktemp("exported")
    for name, (auto_class, config) in CONFIGS.items():
        model, inputs = pretrained(name, auto_class), batch(name)
        with torch.no_grad():
            softmax = model(**inputs)[0]
            logits = polynomial(model, config)(**inputs)[0]
        model.save_pretrained(folder / name)
        hp.export_remote_code(folder / name)
        torch.save({"class": auto_class, "inputs": inputs, "logits": logits, "softmax": softmax}, folder / f"{name}.pt")
    return folder


BLOCKED = f"""
{without("hf_polyattn")}
import torch, transformers
from pathlib import Path

file = Path(sys.argv[1])
case = torch.load(file.with_suffix(".pt"))
auto_class = getattr(transformers, case["class"])
assert "polyattn" not in transformers.modeling_utils.AttentionInterface().valid_keys()
"""
RUN = """
model, info = auto_class.from_pretrained(file, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
with torch.no_grad():
    logits = model(**case["inputs"])[0]
error = lambda name: float((logits - case[name]).abs().max() / case[name].abs().max())
low = auto_class.from_pretrained(file, trust_remote_code=True, dtype=torch.bfloat16)
low.half()
low.half()
kinds = {str(value.dtype) for key, value in low.named_parameters() if "polyattn" in key}
try:
    model(**case["inputs"], output_attentions=True)
except ValueError as refusal:
    assert "pip install hf_polyattn" in str(refusal)
else:
    raise AssertionError("attention weights")
if model.can_generate():
    ids = case["inputs"]["input_ids"][:1, :5]
    greedy = [model.double().generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0)
              for cache in (True, False)]
    assert torch.equal(*greedy)
model.float().save_pretrained(sys.argv[2])
again = auto_class.from_pretrained(sys.argv[2], trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(again(**case["inputs"])[0], logits, rtol=1e-4, atol=1e-4)
print(error("logits"), error("softmax"), *kinds)
"""
REFUSED = """
try:
    auto_class.from_pretrained(file)
except ValueError as refusal:
    print(str(refusal).splitlines()[0])
"""


def run(code: str, tmp_path: Path, *arguments: object) -> str:
    """Returns what code prints in a new process that has no hf_polyattn."""
    command = [sys.executable, "-c", BLOCKED + code, *map(str, arguments)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", CONFIGS)
def test_trusted_code_runs_without_the_package(name: str, exported: Path, tmp_path: Path) -> None:
    error, softmax, *dtypes = run(RUN, tmp_path, exported / name, tmp_path / "again").split()
    assert float(error) < TOLERANCE
    assert float(softmax) > 100 * TOLERANCE
    assert dtypes == ["torch.float32"]
    first, again = (
        json.loads((folder / "config.json").read_text()) for folder in (exported / name, tmp_path / "again")
    )
    for key in ("architectures", "attn_implementation", "auto_map", "polyattn_config"):
        assert again[key] == first[key]


def test_code_beside_a_checkpoint_of_an_earlier_version_runs(exported: Path, tmp_path: Path) -> None:
    case, folder = torch.load(exported / "llama.pt"), tmp_path / "llama"
    model = AutoModelForCausalLM.from_pretrained(exported / "llama")
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, RelativePolynomial):
                part.delta.zero_()
        logits = model(**case["inputs"])[0]
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith((".delta", ".directions"))}
    assert len(tensors) - len(kept) == 5 * 3 * 2
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    hp.export_remote_code(folder)
    torch.save({**case, "logits": logits, "softmax": case["logits"]}, tmp_path / "llama.pt")
    error, trained, _ = run(RUN, tmp_path, folder, tmp_path / "again").split()
    assert float(error) < TOLERANCE < float(trained)


def test_untrusted_code_is_not_run(exported: Path, tmp_path: Path) -> None:
    assert "pip install hf_polyattn" in run(REFUSED, tmp_path, exported / "gpt2-zinc")
    assert not (tmp_path / "modules").exists()


@pytest.mark.parametrize("trust", [True, False], ids=["trusted", "untrusted"])
def test_with_the_package_its_code_runs(trust: bool, exported: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import transformers
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    case = torch.load(exported / "llama.pt")
    model = getattr(transformers, case["class"]).from_pretrained(exported / "llama", trust_remote_code=trust)
    assert type(model).__module__.startswith("transformers_modules") == trust
    assert len(patched_layers(model)) == 5
    with torch.no_grad():
        assert torch.equal(model(**case["inputs"])[0], case["logits"])


def test_the_command_line_exports_code(exported: Path) -> None:
    code = exported / "gpt2-zinc" / "modeling_polyattn.py"
    written = code.read_text()
    code.unlink()
    result = CliRunner().invoke(app, ["export-code", str(code.parent)])
    assert result.exit_code == 0
    assert "trust_remote_code=True" in result.output
    assert code.read_text() == written


def test_every_head_of_a_family_is_exported(exported: Path) -> None:
    named = json.loads((exported / "minilm" / "config.json").read_text())["auto_map"]
    assert named["AutoModel"] == "modeling_polyattn.BertModel"
    assert named["AutoModelForSequenceClassification"] == "modeling_polyattn.BertForSequenceClassification"
    code = (exported / "minilm" / "modeling_polyattn.py").read_text()
    assert "class BertForSequenceClassification(PolynomialModel, transformers.BertForSequenceClassification):" in code
    assert '"encoder.layer.0.attention.self": (12, 32),' in code


def test_only_polynomial_models_are_exported(checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(hp.PatchError, match=r"holds no saved model: there is no config.json"):
        hp.export_remote_code(tmp_path)
    with pytest.raises(hp.PatchError, match=r"is softmax and needs no code; call patch_model"):
        hp.export_remote_code(checkpoint("gpt2-zinc"))
    assert not (checkpoint("gpt2-zinc") / "modeling_polyattn.py").exists()


LACKING = """
from safetensors.torch import load_file, save_file
tensors = load_file(file / "model.safetensors")
del tensors["transformer.h.1.attn.polyattn.center"]
auto_class.from_pretrained(file, trust_remote_code=True).save_pretrained(sys.argv[2])
save_file(tensors, f"{sys.argv[2]}/model.safetensors", metadata={"format": "pt"})
try:
    auto_class.from_pretrained(sys.argv[2], trust_remote_code=True)
except ValueError as refusal:
    print(refusal)
"""


def test_exported_code_refuses_a_checkpoint_that_lacks_polynomials(exported: Path, tmp_path: Path) -> None:
    refusal = run(LACKING, tmp_path, exported / "gpt2-zinc", tmp_path / "lacking")
    assert "lacks ['transformer.h.1.attn.polyattn.center']" in refusal
