"""Patched models on the Hub, through a loopback server and in processes of their own, like any other user's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub

import hf_polyattn as hp
from hf_polyattn.patching.saved_config import SAVED_IMPLEMENTATION

MODELS = {  # repository: checkpoint and what loads it
    "me/bert-poly3": ("minilm", "AutoModel"),
    "me/gpt2-poly6": ("gpt2-zinc", "AutoModelForCausalLM"),
    "me/llama-poly3": ("llama", "AutoModelForCausalLM"),
    "me/vit-poly4": ("vit", "AutoModelForImageClassification"),
}

PUSH = """
found = {}
for repository, (path, loader, spec, inputs) in arguments.items():
    inputs = torch.load(inputs)
    model = getattr(transformers, loader).from_pretrained(path)
    softmax = logits(model, inputs)
    hp.patch_model(model, spec)
    hp.calibrate(model, [inputs], progress=False)
    processor = None if "vit" in repository else transformers.AutoTokenizer.from_pretrained(path)
    commit = model.push_to_hub(repository, processor=processor).oid
    case = {"inputs": inputs, "logits": logits(model, inputs), "softmax": softmax, "loader": loader}
    torch.save(case, folder / f"{repository.rpartition('/')[2]}.pt")
    found[repository] = [commit, model.push_to_hub(repository, processor=processor).oid]

    if "llama" in repository:
        model.push_to_hub("me/llama-shards", max_shard_size="200KB", tags=["stories"])
        with torch.no_grad():
            model.model.layers[0].self_attn.polyattn.coefficients.mul_(1.01)
            model.model.layers[1].self_attn.polyattn.radius.mul_(1.5)
        torch.save(logits(model, inputs), folder / "dev.pt")
        model.push_to_hub(repository, revision="dev")
        model.bfloat16().push_to_hub("me/llama-bf16")
        model.save_pretrained(folder / "bf16")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def pushed(process: Any, checkpoint: Any, batch: Any, folder: Path, hub: LoopbackHub) -> dict[str, Any]:
    """Four real checkpoints, patched, calibrated and pushed; the commits of the first push and of the second."""
    import torch

    arguments = {}
    for repository, (name, loader) in MODELS.items():
        torch.save(batch(name, count=4), folder / f"{name}-inputs.pt")
        spec = f"{repository.rpartition('-')[2]}{'' if repository.endswith('3') else '-l1'}"
        arguments[repository] = [str(checkpoint(name)), loader, spec, str(folder / f"{name}-inputs.pt")]
    found: dict[str, Any] = process(PUSH, arguments, home="pusher")
    return {**found, "requests": hub.take_requests()}


# ---------------------------------------------------------------- pushing


def test_a_push_is_one_commit_and_a_second_one_without_a_change_is_none(
    pushed: dict[str, Any], hub: LoopbackHub
) -> None:
    for repository in MODELS:
        history = hub.store.repositories[repository].history()
        assert len(history) == 2
        assert history[0].title.startswith("Upload ")
        assert pushed[repository] == [history[0].oid, history[0].oid]
        files = history[0].files
        assert {"README.md", "config.json", "model.safetensors"} <= set(files)
        assert ("tokenizer.json" in files) == ("vit" not in repository)
        config = json.loads(files["config.json"].content)
        assert (config["attn_implementation"], "polyattn_config" in config) == (SAVED_IMPLEMENTATION, True)
    uploads = [request.path for request in pushed["requests"] if request.method == "PUT"]
    assert len(uploads) == len(set(uploads))  # no object twice
    shards = [path for path in hub.store.repositories["me/llama-shards"].head().files if path.endswith(".safetensors")]
    assert len(uploads) == len(MODELS) + len(shards) + len(("dev", "bf16"))
    assert not any(request.authorized for request in pushed["requests"] if request.server == "storage")


def test_cards_of_models_from_a_folder_hold_its_license_but_not_its_path(
    pushed: dict[str, Any], hub: LoopbackHub, checkpoint: Callable[[str], Path]
) -> None:
    for repository, (name, loader) in MODELS.items():
        text = hub.store.repositories[repository].head().files["README.md"].content.decode()
        assert f'{loader}.from_pretrained("{repository}")' in text
        assert str(checkpoint(name)) not in text
        readme = checkpoint(name) / "README.md"
        license = ModelCard.load(readme).data.get("license") if readme.exists() else None
        assert ModelCard(text).data.get("license") == license
    assert "license: apache-2.0" in hub.store.repositories["me/bert-poly3"].head().files["README.md"].content.decode()


def test_a_softmax_model_has_no_card(pretrained: Any) -> None:
    with pytest.raises(hp.PatchError, match="LlamaForCausalLM is not patched; call patch_model"):
        hp.model_card(pretrained("llama", "AutoModelForCausalLM"))


def test_a_branch_is_pushed_beside_the_main_one(pushed: dict[str, Any], hub: LoopbackHub) -> None:
    repository = hub.store.repositories["me/llama-poly3"]
    assert set(repository.branches) == {"main", "dev"}
    main, branch = repository.head().files, repository.head("dev").files
    assert main["model.safetensors"] != branch["model.safetensors"]
    assert main["README.md"] == branch["README.md"]


# ---------------------------------------------------------------- loading

LOAD = """
found = {}
for name in arguments:
    case = torch.load(folder / f"{name}.pt")
    model = getattr(transformers, case["loader"]).from_pretrained(f"me/{name}")
    own = logits(model, case["inputs"])
    found[name] = [torch.equal(own, case["logits"]), torch.equal(own, case["softmax"])]

case = torch.load(folder / "llama-poly3.pt")
load = transformers.AutoModelForCausalLM.from_pretrained
dev = logits(load("me/llama-poly3", revision="dev"), case["inputs"])
found["dev"] = [torch.equal(dev, torch.load(folder / "dev.pt")), torch.equal(dev, case["logits"])]
low, local = load("me/llama-bf16", dtype="auto"), load(folder / "bf16", dtype="auto")
tensors = {key: value for key, value in low.state_dict().items() if not key.endswith("polyattn.settings")}
types = {("polyattn" in key, value.dtype) for key, value in tensors.items()}
assert types == {(True, torch.float32), (False, torch.bfloat16)}, types
low = logits(low, case["inputs"])
found["bf16"] = [torch.equal(low, logits(local, case["inputs"])), torch.equal(low.float(), dev)]
shards = load("me/llama-shards", device_map="auto", low_cpu_mem_usage=True)
found["shards"] = [torch.equal(logits(shards, case["inputs"]), case["logits"]), False]

tell = transformers.pipeline(model="me/llama-poly3", device="cpu")
said = tell("Once upon a time", max_new_tokens=8, do_sample=False)
model, tokenizer = load("me/llama-poly3"), transformers.AutoTokenizer.from_pretrained("me/llama-poly3")
start = tokenizer("Once upon a time", return_tensors="pt").input_ids
by_hand = tokenizer.decode(model.generate(start, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
found["pipeline"] = [said[0]["generated_text"] == by_hand != "Once upon a time", False]
print(json.dumps(found))
"""


def test_a_cold_and_a_warm_process_load_what_was_pushed_to_the_bit(
    pushed: dict[str, Any], process: Any, hub: LoopbackHub
) -> None:
    names = [repository.partition("/")[2] for repository in MODELS]
    for temperature in ("cold", "warm"):
        hub.take_requests()
        found = process(LOAD, names)
        del found["stderr"]
        assert found == {name: [True, False] for name in (*names, "dev", "bf16", "shards", "pipeline")}
        downloads = {request.path for request in hub.take_requests() if request.server == "storage"}
        assert bool(downloads) == (temperature == "cold")


STOCK = """
found = {name: message(getattr(transformers, loader).from_pretrained, name) for name, (_, loader) in arguments.items()}
found["pipeline"] = message(transformers.pipeline, model="me/llama-poly3")
assert "hf_polyattn" not in sys.modules
print(json.dumps(found))
"""


def test_transformers_without_the_plugin_refuses_in_one_sentence(pushed: dict[str, Any], process: Any) -> None:
    found = process(STOCK, MODELS, imports="import transformers")
    del found["stderr"]
    for name, refusal in found.items():
        assert refusal is not None, name
        kind, text = refusal
        assert kind == "ValueError"
        assert 'Specified `attn_implementation="polyattn (pip install hf_polyattn)"` is not supported' in text, text


# ---------------------------------------------------------------- composite models

COMPOSE = """
vit, gpt2, inputs = arguments
inputs = torch.load(inputs)
torch.manual_seed(0)
decoder = transformers.AutoModelForCausalLM.from_pretrained(gpt2, add_cross_attention=True)
model = transformers.VisionEncoderDecoderModel(encoder=transformers.ViTModel.from_pretrained(vit), decoder=decoder)
for name, parameter in model.named_parameters():
    if "crossattention" in name or "enc_to_dec_proj" in name:
        torch.nn.init.normal_(parameter, std=0.1)  # new, and large enough to matter
softmax = logits(model, inputs)
hp.patch_model(model, "poly3", exclude=["encoder.*"])
model.push_to_hub("me/captioner")
torch.save({"inputs": inputs, "logits": logits(model, inputs), "softmax": softmax}, folder / "captioner.pt")
print(json.dumps({}))
"""
LOAD_COMPOSED = """
case, found = torch.load(folder / "captioner.pt"), {}
for name in ("me/captioner", "me/captioner-again"):
    model = transformers.VisionEncoderDecoderModel.from_pretrained(name)
    own = logits(model, case["inputs"])
    halves = {row[0].partition(".")[0] for row in hp.describe(model).rows if row[-1] == "patched"}
    found[name] = [torch.equal(own, case["logits"]), torch.equal(own, case["softmax"]), sorted(halves)]
    model.push_to_hub("me/captioner-again")
print(json.dumps(found))
"""
STOCK_COMPOSED = """
load = transformers.VisionEncoderDecoderModel.from_pretrained
print(json.dumps({name: message(load, name) for name in ("me/captioner", "me/captioner-again")}))
"""


def test_a_composite_model_with_one_polynomial_half_round_trips(
    process: Any, checkpoint: Callable[[str], Path], batch: Any, folder: Path
) -> None:
    import torch

    inputs = {**batch("vit", count=2), "decoder_input_ids": batch("gpt2-tinystories", count=2)["input_ids"]}
    torch.save(inputs, folder / "captioner-inputs.pt")
    paths = [str(path) for path in (checkpoint("vit"), checkpoint("gpt2-tinystories"), folder / "captioner-inputs.pt")]
    process(COMPOSE, paths, home="pusher")
    found = process(LOAD_COMPOSED)
    refusals = process(STOCK_COMPOSED, imports="import transformers")
    for name in ("me/captioner", "me/captioner-again"):
        assert found[name] == [True, False, ["decoder"]]
        assert "pip install hf_polyattn" in refusals[name][1]


# ---------------------------------------------------------------- Trainer and PEFT

TRAINED = """
import peft
inputs = torch.load(folder / "llama-poly3.pt")["inputs"]
load = transformers.AutoModelForCausalLM.from_pretrained
rows = [{"input_ids": row, "labels": row} for row in inputs["input_ids"]]
options = {"use_cpu": True, "max_steps": 1, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
trained = transformers.TrainingArguments(folder / "trained", hub_model_id="me/trained", **options)
trainer = transformers.Trainer(load("me/llama-poly3"), trained, train_dataset=rows, eval_dataset=rows[:1])
trainer.train()
trainer.evaluate()
trainer.push_to_hub(dataset="TinyStories")
expected = logits(trainer.model, inputs)
again = load("me/trained")
found = {"trained": [torch.equal(logits(again, inputs), expected), trainer.state.global_step]}
edit("me/trained")
trainer.push_to_hub()
trainer.push_to_hub(overwrite_card=True, revision="main")

again.push_to_hub("me/pushed-again")  # nothing is lost on the way through the Hub and back
found["pushed again"] = torch.equal(logits(load("me/pushed-again"), inputs), expected)

lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["polyattn"], task_type="CAUSAL_LM")
adapted = peft.get_peft_model(load("me/llama-poly3"), lora)
with torch.no_grad():
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save.default.delta" in name:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
expected = logits(adapted, inputs)
adapted.push_to_hub("me/adapter")
base = load("me/llama-poly3")
found["unadapted"] = torch.equal(logits(base, inputs), expected)
reloaded = peft.PeftModel.from_pretrained(base, "me/adapter")
found["adapted"] = torch.equal(logits(reloaded, inputs), expected)
merged = reloaded.merge_and_unload()
found["merged"] = bool((logits(merged, inputs) - expected).abs().max() < 1e-4 * expected.abs().max())
merged.push_to_hub("me/merged")
found["merged again"] = torch.equal(logits(load("me/merged"), inputs), logits(merged, inputs))
found["adapted by name"] = torch.equal(logits(load("me/adapter"), inputs), expected)
found["unpatched"] = message(peft.PeftModel.from_pretrained, load(arguments), "me/adapter")
found["unpatched, without PeftModel"] = message(load(arguments).load_adapter, "me/adapter")
print()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def trained(pushed: dict[str, Any], process: Any, checkpoint: Any) -> dict[str, Any]:
    found: dict[str, Any] = process(TRAINED, str(checkpoint("llama")))
    return found


def test_trainer_pushes_a_card_of_the_polynomials_and_of_the_training(
    trained: dict[str, Any], hub: LoopbackHub
) -> None:
    assert trained["trained"] == [True, 1]
    commits = [*reversed(hub.store.repositories["me/trained"].history())][1:]
    first, *edited, replaced = (commit.files["README.md"].content.decode() for commit in commits)
    card = ModelCard(first)
    data: Any = card.data
    assert {"hf_polyattn", "polynomial-attention", "poly3", "generated_from_trainer"} <= set(data.tags)
    assert (data.base_model, data.pipeline_tag) == ("me/llama-poly3", "text-generation")
    for line in ("# trained", "`poly3` in 5", "- learning_rate: 5e-05", "- Loss: ", "import hf_polyattn"):
        assert line in card.text, line
    assert "Nothing was measured" not in card.text
    assert set(edited) == {first + "Mine."}
    assert ModelCard(replaced).data.tags == data.tags  # type: ignore[attr-defined]
    assert not replaced.endswith("Mine.")


def test_adapters_go_through_the_hub_with_their_polynomials(trained: dict[str, Any], hub: LoopbackHub) -> None:
    assert all(trained[name] is True for name in ("adapted", "adapted by name", "merged", "merged again"))
    assert trained["unadapted"] is False
    for name in ("unpatched", "unpatched, without PeftModel"):
        assert trained[name] is None  # the adapter brings its polynomials
    assert "model.safetensors" not in hub.store.repositories["me/adapter"].head().files


def test_models_pushed_again_from_the_hub_keep_every_guard(trained: dict[str, Any], hub: LoopbackHub) -> None:
    assert trained["pushed again"] is True
    for name in ("me/trained", "me/pushed-again", "me/merged"):
        config = json.loads(hub.store.repositories[name].head().files["config.json"].content)
        assert config["attn_implementation"] == SAVED_IMPLEMENTATION
        assert config["polyattn_config"]["format_version"] == 2
        assert len(config["polyattn_config"]["modules"]) == config["num_hidden_layers"]
