"""What goes wrong on the way to the Hub is said, and leaves nothing half done there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub

ERRORS = """
time.sleep = lambda seconds: None  # the client waits before it tries again
model = transformers.AutoModelForCausalLM.from_pretrained(arguments)
found = {}
hp.patch_model(model, "poly6-l1")
model.push_to_hub("me/broken")              # the first upload breaks off and is tried again
hp.patch_model(hp.unpatch_model(model), "poly4-l1")
found["uploads"] = message(model.push_to_hub, "me/broken")  # all six tries break off
found["commit"] = message(model.push_to_hub, "me/broken")   # the upload is whole, the commit breaks off
found["last"] = model.push_to_hub("me/broken").oid

found["token"] = message(model.push_to_hub, "me/refused", token="hf_wrong")
found["namespace"] = message(model.push_to_hub, "other/model")
found["absent"] = message(transformers.AutoModelForCausalLM.from_pretrained, "me/absent")
found["revision"] = message(transformers.AutoModelForCausalLM.from_pretrained, "me/broken", revision="v9")
found["wrong token"] = message(transformers.AutoModelForCausalLM.from_pretrained, "me/broken", token="hf_wrong")
found["option"] = message(hp.unpatch_model(model).push_to_hub, "me/broken", overwrite_card=True)

from hf_polyattn import cli
def command(*words):
    sys.argv[1:] = words
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
model = hp.patch_model(model, "poly3")
model.save_pretrained(folder / "model")
transformers.AutoTokenizer.from_pretrained(arguments).save_pretrained(folder / "model")
found["command refused"] = command("push", str(folder / "model"), "other/model")
found["command"] = command("push", str(folder / "model"), "me/commanded", "--branch", "dev")
edit("me/commanded", "dev")
command("push", str(folder / "model"), "me/commanded", "--branch", "dev")
command("push", str(folder / "model"), "me/commanded", "--branch", "dev", "--overwrite-card")
found["described"] = command("describe", "me/broken")
print()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refused(process: Any, checkpoint: Any, hub: LoopbackHub) -> dict[str, Any]:
    hub.take_requests()
    hub.break_connections("PUT", "", [1, *range(3, 9)])
    hub.break_connections("POST", r"me/broken/commit", [2])
    found: dict[str, Any] = process(ERRORS, str(checkpoint("llama")), home="errors")
    hub.breakages.clear()
    return {**found, "requests": hub.take_requests()}


def test_a_broken_upload_is_tried_again_or_reported_and_never_leaves_half_a_model(
    refused: dict[str, Any], hub: LoopbackHub
) -> None:
    uploads = [request.status for request in refused["requests"] if request.method == "PUT"][:9]
    assert uploads == [0, 200, 0, 0, 0, 0, 0, 0, 200]
    assert "Error while uploading 'model.safetensors' to the Hub." in refused["uploads"][1]
    assert refused["commit"] is not None
    last, first, initial = hub.store.repositories["me/broken"].history()
    assert last.oid == refused["last"]
    assert set(initial.files) == {".gitattributes"}
    for commit, spec in ((first, "poly6-l1"), (last, "poly4-l1")):  # each commit is whole: weights, config and card
        assert json.loads(commit.files["config.json"].content)["polyattn_config"]["spec"] == spec
        assert spec in ModelCard(commit.files["README.md"].content.decode()).data.tags  # type: ignore[attr-defined]
    assert first.files["model.safetensors"] != last.files["model.safetensors"]


def test_refusals_of_the_hub_say_what_is_wrong(refused: dict[str, Any], hub: LoopbackHub) -> None:
    for name, said in {
        "token": "Invalid credentials in Authorization header",
        "namespace": "don't have the rights to write to the namespace 'other'",
        "absent": "me/absent is not a local folder and is not a valid model identifier",
        "revision": "v9 is not a valid git identifier",
        "wrong token": "me/broken",
        "option": "unexpected keyword argument 'overwrite_card'",
    }.items():
        kind, text = refused[name]
        assert said in text, text
        assert kind != "PatchError"
    assert set(hub.store.repositories).isdisjoint({"me/refused", "other/model"})


def test_the_command_pushes_model_tokenizer_and_card_at_once(refused: dict[str, Any], hub: LoopbackHub) -> None:
    assert "cannot push" in refused["command refused"]
    assert "other" in refused["command refused"]
    assert refused["command"] == refused["described"] == 0
    repository = hub.store.repositories["me/commanded"]
    first, edited, replaced = [*reversed(repository.history("dev"))][1:]  # the one that kept the card changed nothing
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(first.files)
    assert edited.files["README.md"].content == first.files["README.md"].content + b"Mine."
    assert replaced.files["README.md"] == first.files["README.md"]
    assert set(repository.head("main").files) == {".gitattributes"}
