"""Saved models reload anywhere with the plugin, to the bit, and nowhere as softmax in silence."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from auto_classes import SAVED
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModel,
    pipeline,
)

import hf_polyattn as hp
from hf_polyattn.patching.patched import patched_layers
from hf_polyattn.patching.saved_config import SAVED_IMPLEMENTATION


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)[0]


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def saved(pretrained: Any, polynomial: Any, batch: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patched checkpoints of the four classes that exist here, each with its inputs and logits."""
    folder = tmp_path_factory.mktemp("saved")
    for name, auto_class in SAVED.items():
        model, inputs = pretrained(name, auto_class), batch(name)
        softmax = output(model, inputs)
        polynomial(model).save_pretrained(folder / name)
        case = {"class": auto_class, "inputs": inputs, "softmax": softmax, "logits": output(model, inputs)}
        torch.save(case, folder / f"{name}.pt")
    return folder


# ---------------------------------------------------------------- a new process

LOAD_ALL = """
import sys
from pathlib import Path
{imports}
import torch
torch.set_num_threads({threads})
for file in sorted(Path(sys.argv[1]).glob("*.pt")):
    case = torch.load(file)
    model = getattr(transformers, case["class"]).from_pretrained(file.with_suffix("")).eval()
    with torch.no_grad():
        logits = model(**case["inputs"])[0]
    print(file.stem, torch.equal(logits, case["logits"]), torch.equal(logits, case["softmax"]))
"""
IMPORTS = {
    "plugin-first": "import hf_polyattn, transformers",
    "plugin-last": "import transformers; from transformers import AutoModel, BertModel, Trainer; import hf_polyattn",
}


@pytest.mark.parametrize("order", IMPORTS)
def test_a_new_process_loads_the_same_logits_to_the_bit(order: str, saved: Path) -> None:
    done = python(LOAD_ALL.format(imports=IMPORTS[order], threads=torch.get_num_threads()), saved)
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [[name, "True", "False"] for name in sorted(SAVED)]


REFUSED = """
import sys
from pathlib import Path
import transformers
import torch
for file in sorted(Path(sys.argv[1]).glob("*.pt")):
    try:
        getattr(transformers, torch.load(file)["class"]).from_pretrained(file.with_suffix(""))
        print(file.stem, "loaded")
    except ValueError as error:
        print(file.stem, "refused", "pip install hf_polyattn" in str(error).splitlines()[0], end=" ")
    case = torch.load(file)
    auto = getattr(transformers, case["class"])
    model = auto.from_pretrained(file.with_suffix(""), attn_implementation="sdpa").eval()
    with torch.no_grad():
        print(torch.allclose(model(**case["inputs"])[0], case["softmax"], atol=1e-4))
assert "hf_polyattn" not in sys.modules
"""


def test_without_the_plugin_loading_is_refused(saved: Path) -> None:
    done = python(REFUSED, saved)
    assert done.returncode == 0, done.stderr
    # and, by Transformers' own doing, softmax where sdpa is asked for: README and DESIGN say so
    expected = [[name, "refused", "True", "True"] for name in sorted(SAVED)]
    assert [line.split() for line in done.stdout.splitlines()] == expected


# ---------------------------------------------------------------- the guard


def guard(folder: Path) -> tuple[str | None, bool]:
    config = json.loads((folder / "config.json").read_text())
    return config.get("attn_implementation"), "polyattn_config" in config


@pytest.mark.parametrize("name", SAVED)
def test_saving_again_keeps_the_guard(name: str, saved: Path, tmp_path: Path) -> None:
    assert guard(saved / name) == (SAVED_IMPLEMENTATION, True)
    AutoModel.from_pretrained(saved / name).save_pretrained(tmp_path)
    assert guard(tmp_path) == (SAVED_IMPLEMENTATION, True)
    with hp.softmax_attention(model := AutoModel.from_pretrained(tmp_path)):
        model.save_pretrained(tmp_path / "again")
    assert guard(tmp_path / "again") == (SAVED_IMPLEMENTATION, True)
    hp.unpatch_model(model).save_pretrained(tmp_path / "softmax")
    assert guard(tmp_path / "softmax") == (None, False)
    assert not any("polyattn" in key for key in load_file(tmp_path / "softmax" / "model.safetensors"))


def test_a_copied_config_builds_the_same_modules(saved: Path) -> None:
    config = copy.deepcopy(AutoModelForCausalLM.from_pretrained(saved / "llama").config)
    model = AutoModelForCausalLM.from_config(config)
    assert len(patched_layers(model)) == 5
    assert {layer.config for _, layer in patched_layers(model)} == {
        hp.PolyAttentionConfig("poly3", interval=True, clamp=True, key_shift=True)
    }
    assert model.config._attn_implementation == "polyattn"


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM], ids=["bare", "head"])
def test_polynomials_that_the_config_does_not_mention_are_refused(
    auto_class: Any, saved: Path, checkpoint: Any, tmp_path: Path
) -> None:
    softmax = AutoConfig.from_pretrained(checkpoint("minilm"))
    auto_class.from_pretrained(saved / "minilm").save_pretrained(tmp_path)
    for other_class in (AutoModel, AutoModelForMaskedLM):
        with pytest.raises(hp.PatchError, match=r"polynomial attention at .*layer.0.attention.self'.*would silently"):
            other_class.from_pretrained(tmp_path, config=copy.deepcopy(softmax))


def test_fewer_layers_load_without_the_polynomials_of_the_others(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "llama", num_hidden_layers=2)
    assert len(patched_layers(model)) == 2


def test_a_config_of_another_version_is_refused(saved: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(saved / "llama")
    config.polyattn_config = {**config.polyattn_config, "format_version": 99}
    with pytest.raises(hp.SpecError, match="format_version 99"):
        AutoModelForCausalLM.from_pretrained(saved / "llama", config=config)


# ---------------------------------------------------------------- other heads, shards, submodels


def test_another_head_keeps_the_polynomials(saved: Path, batch: Any, tmp_path: Path) -> None:
    inputs, base = batch("minilm"), AutoModel.from_pretrained(saved / "minilm")
    expected = base.state_dict()
    for auto_class in (AutoModelForSequenceClassification, AutoModelForMaskedLM):
        model = auto_class.from_pretrained(saved / "minilm")
        state = model.bert.state_dict()
        assert sum("polyattn" in key for key in state) == 7 * 6
        assert all(torch.equal(value, expected[key]) for key, value in state.items())
        assert torch.equal(output(model.bert, inputs), output(base, inputs))

    model.save_pretrained(tmp_path)  # and back, from the head to the bare model
    assert torch.equal(output(AutoModel.from_pretrained(tmp_path), inputs), output(base, inputs))
    with hp.softmax_attention(base):
        assert not torch.equal(output(base, inputs), output(model.bert, inputs))


HEADS = {
    "minilm": ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice", "MaskedLM"),
    "gpt2-tinystories": ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"),
    # LlamaForQuestionAnswering has a prefix of its own: Transformers loads no other class from it, softmax neither.
    "llama": ("CausalLM", "SequenceClassification", "TokenClassification"),
    "vit": ("ImageClassification", "MaskedImageModeling"),
}


@pytest.mark.parametrize(("name", "head"), [(name, head) for name, heads in HEADS.items() for head in heads])
def test_every_head_takes_the_polynomials_and_gives_them_back(
    name: str, head: str, saved: Path, batch: Any, tmp_path: Path
) -> None:
    inputs, base = batch(name), AutoModel.from_pretrained(saved / name).eval()
    base.save_pretrained(tmp_path / "base")
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path / "base").eval()
    assert len(patched_layers(model)) == len(patched_layers(base)) > 0
    for (_, ours), (_, expected) in zip(patched_layers(model), patched_layers(base), strict=True):
        assert ours.config == expected.config
        assert all(torch.equal(tensor, expected.state_dict()[key]) for key, tensor in ours.state_dict().items())
    assert torch.equal(output(model.base_model, inputs), output(base, inputs))
    model.save_pretrained(tmp_path / "head")
    assert guard(tmp_path / "head") == (SAVED_IMPLEMENTATION, True)
    back = AutoModel.from_pretrained(tmp_path / "head").eval()
    assert torch.equal(output(back, inputs), output(base, inputs))
    with hp.softmax_attention(base):
        assert not torch.equal(output(back, inputs), output(base, inputs))


# ---------------------------------------------------------------- ways to load

WAYS = {
    "device map": {"device_map": "auto"},
    "device map by name": {"device_map": {"": "cpu"}},
    "low memory": {"low_cpu_mem_usage": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16 by device map": {"dtype": torch.bfloat16, "device_map": "auto"},
    "dtype of the file": {"dtype": "auto"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SAVED)
def test_every_way_to_load_keeps_the_polynomials_in_float32(name: str, way: str, saved: Path, batch: Any) -> None:
    case, auto_class = torch.load(saved / f"{name}.pt"), getattr(transformers, SAVED[name])
    expected = dict(patched_layers(auto_class.from_pretrained(saved / name)))
    model = auto_class.from_pretrained(saved / name, **WAYS[way]).eval()
    low = "bfloat16" in way
    assert model.dtype == (torch.bfloat16 if low else torch.float32)
    layers = dict(patched_layers(model))
    assert layers.keys() == expected.keys()
    for path, layer in layers.items():
        for key, tensor in layer.state_dict().items():
            assert tensor.dtype == (torch.uint8 if key == "settings" else torch.float32)
            assert torch.equal(tensor, expected[path].state_dict()[key]), key
    if low:
        inputs = {key: x.to(torch.bfloat16) if x.is_floating_point() else x for key, x in case["inputs"].items()}
        assert torch.isfinite(output(model, inputs)).all()
    else:
        assert torch.equal(output(model, case["inputs"]), case["logits"])


def test_a_model_built_without_memory_takes_the_weights_later(saved: Path) -> None:
    case = torch.load(saved / "llama.pt")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(saved / "llama")).eval()
    assert len(patched_layers(model)) == 5
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    whole = AutoModelForCausalLM.from_pretrained(saved / "llama")
    model.to_empty(device="cpu")
    model.load_state_dict(whole.state_dict())
    for name, buffer in whole.named_buffers():  # the rotary frequencies, which no checkpoint has
        model.get_buffer(name).copy_(buffer)
    assert torch.equal(output(model, case["inputs"]), case["logits"])


def test_text_classification_pipeline(saved: Path, checkpoint: Any, rows: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(saved / "minilm").eval()
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("minilm"))
    tokenizer.save_pretrained(tmp_path)
    sentence = rows("minilm", 1)[0]
    found = pipeline("text-classification", str(tmp_path))(sentence)[0]["score"]
    inputs = tokenizer(sentence, return_tensors="pt")
    assert found == pytest.approx(float(output(model, inputs).softmax(-1).max()), rel=1e-5)
    with hp.softmax_attention(model):
        assert found != pytest.approx(float(output(model, inputs).softmax(-1).max()), rel=1e-3)


def test_shards_load_to_the_bit(saved: Path, batch: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "gpt2-tinystories")
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    expected = torch.load(saved / "gpt2-tinystories.pt")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output(reloaded, batch("gpt2-tinystories")), expected["logits"])
    assert not torch.equal(expected["softmax"], expected["logits"])


def clip() -> CLIPModel:
    torch.manual_seed(0)
    text = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "vocab_size": 64, "eos_token_id": 2, "initializer_range": 0.4,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).eval()


def test_a_submodel_saved_alone_keeps_its_guard(polynomial: Any, tmp_path: Path) -> None:
    model = clip()
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 6, 2]])}
    softmax = output(model.text_model, inputs)
    polynomial(model)
    expected = output(model.text_model, inputs)
    assert not torch.equal(expected, softmax)

    model.text_model.save_pretrained(tmp_path / "text")
    assert guard(tmp_path / "text") == (SAVED_IMPLEMENTATION, True)
    assert torch.equal(output(CLIPTextModel.from_pretrained(tmp_path / "text"), inputs), expected)

    model.save_pretrained(tmp_path / "clip")
    whole = CLIPModel.from_pretrained(tmp_path / "clip")
    assert len(patched_layers(whole)) == 4
    assert torch.equal(output(whole.text_model, inputs), expected)
    assert torch.equal(output(CLIPTextModel.from_pretrained(tmp_path / "clip"), inputs), expected)


def test_the_softmax_half_of_a_patched_model_loads_alone(tmp_path: Path) -> None:
    hp.patch_model(clip(), "poly3", include=["text_model*"]).save_pretrained(tmp_path)
    assert len(patched_layers(CLIPModel.from_pretrained(tmp_path))) == 2
    assert len(patched_layers(CLIPTextModel.from_pretrained(tmp_path))) == 2
    assert not hp.is_patched(CLIPVisionModel.from_pretrained(tmp_path))


def test_patched_layers_only_are_saved_and_loaded(pretrained: Any, polynomial: Any, batch: Any, tmp_path: Path) -> None:
    inputs = batch("llama")
    model = polynomial(
        pretrained("llama", "AutoModelForCausalLM"), hp.PolyAttentionConfig("poly3", layers=[0, 3], exclude=["*.4.*"])
    )
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [path for path, _ in patched_layers(reloaded)] == ["model.layers.0.self_attn", "model.layers.3.self_attn"]
    assert torch.equal(output(reloaded, inputs), output(model, inputs))
    assert hp.patch_model(reloaded, hp.PolyAttentionConfig("poly3", layers=[0, 3], exclude=["*.4.*"])) is reloaded
