"""The card of a model on the Hub, over a dozen pushes and edits: what it says, and that what a person wrote stays."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub, Repository

CARDS = """
softmax, loader, inputs = arguments
inputs, api = torch.load(inputs), huggingface_hub.HfApi()
model = getattr(transformers, loader).from_pretrained(softmax)
model.push_to_hub("me/stories")  # a softmax model, with a card as a person writes it
text = "---\\nlicense: mit\\nlanguage: en\\n---\\n# Stories\\n"
api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="me/stories")

model = getattr(transformers, loader).from_pretrained("me/stories")
hp.patch_model(model, "poly4-l1")
hp.calibrate(model, [inputs], progress=False)
stories = "roneneldan/TinyStories"
results = [hp.Measurement("perplexity", 4.25, stories, softmax=4.0, split="validation", note="one seed")]
diagnosis = hp.diagnose(model, [inputs], progress=False)
card = hp.model_card(model, results, datasets=[stories], diagnosis=diagnosis)
model.push_to_hub("me/carded", card=card)
model.push_to_hub("me/carded")                                           # without results: those are kept
better = hp.model_card(model, [hp.Measurement("perplexity", 4.125, stories, softmax=4.0)])
model.push_to_hub("me/carded", card=better)                              # nobody edited the card: renewed
edit("me/carded")
model.push_to_hub("me/carded", card=card)                                # kept
model.push_to_hub("me/carded", revision="dev", tags=["small"])           # starts from main: kept, with a tag
edit("me/carded", revision="dev")
model.push_to_hub("me/carded", revision="dev")
model.save_pretrained(folder / "carded", push_to_hub=True, repo_id="me/carded")
transformers.AutoTokenizer.from_pretrained(arguments[0]).push_to_hub("me/carded")
model.push_to_hub("me/carded", card=card, overwrite_card=True)
hp.patch_model(hp.unpatch_model(model), "poly3")
model.push_to_hub("me/carded")                                           # another polynomial than the card's
again = transformers.AutoModelForCausalLM.from_pretrained("me/carded")
again.push_to_hub("me/carded", overwrite_card=True)
print(json.dumps({}))
"""


@pytest.fixture(scope="module")
def carded(process: Any, checkpoint: Any, batch: Any, folder: Path, hub: LoopbackHub) -> tuple[Repository, str]:
    import torch

    torch.save(batch("llama", count=4), folder / "cards-inputs.pt")
    arguments = [str(checkpoint("llama")), "AutoModelForCausalLM", str(folder / "cards-inputs.pt")]
    found = process(CARDS, arguments, home="cards")
    return hub.store.repositories["me/carded"], found["stderr"]


def readmes(repository: Repository, revision: str = "main") -> list[str]:
    """The card's texts in a branch, first to last, each as often as it came to replace another."""
    blobs = [commit.files.get("README.md") for commit in reversed(repository.history(revision))]
    return [text for text, _ in groupby(blob.content.decode() for blob in blobs if blob is not None)]


def test_the_card_says_what_the_model_is_and_what_was_measured(carded: Any, tmp_path: Path) -> None:
    first = readmes(carded[0])[0]
    (tmp_path / "README.md").write_text(first)
    card = ModelCard.load(tmp_path / "README.md")
    data: Any = card.data
    assert data.tags == ["hf_polyattn", "polynomial-attention", "poly4-l1"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.base_model, data.base_model_relation) == ("me/stories", "finetune")
    assert (data.license, data.language) == ("mit", "en")  # of the base model's card
    assert data.datasets == ["roneneldan/TinyStories"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("perplexity", 4.25, "validation")
    assert "| roneneldan/TinyStories, validation | perplexity | 4.0000 | 4.2500 | +6.25 % | one seed |" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("me/carded")' in card.text
    assert "![" in card.text
    assert "(diagnosis.png)" in card.text
    assert "{" not in card.text


def test_the_plot_of_the_norms_is_uploaded_with_its_card(carded: Any) -> None:
    first = carded[0].history()[-2]
    assert first.title == "Upload LlamaForCausalLM"
    assert first.files["diagnosis.png"].content.startswith(b"\x89PNG")


def test_an_edited_card_is_kept_until_it_is_asked_to_go(carded: Any) -> None:
    repository, stderr = carded
    measured, better, edited, replaced, other = readmes(repository)
    assert "4.2500" in measured
    assert "4.1250" in better
    assert edited == better + "Mine."
    assert "edited there and is kept; overwrite_card=True" in stderr
    assert replaced == measured
    data: Any = ModelCard(other).data
    assert data.tags == ["hf_polyattn", "polynomial-attention", "poly3"]
    assert data.eval_results is None
    assert (data.base_model, data.license, data.language) == ("me/stories", "mit", "en")  # the card before it said so


def test_a_branch_keeps_its_own_edited_card(carded: Any) -> None:
    edited, tagged, twice = readmes(carded[0], "dev")[-3:]
    assert edited.endswith("Mine.")
    assert ModelCard(tagged).data.tags[-1] == "small"  # type: ignore[attr-defined]
    assert twice == tagged + "Mine."
