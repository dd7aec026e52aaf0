"""Models inside of other libraries' models: Sentence Transformers, and modules of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn

import hf_polyattn as hp
from hf_polyattn.errors import PatchError
from hf_polyattn.patching.patched import patched_layers

TEXTS = ["a good film", "it rains, and nobody has an umbrella", "the plot is thin"]


class Classifier(nn.Module):
    """A module of one's own around models of Transformers."""

    def __init__(self, *encoders: Any) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.head = nn.Linear(384, 2)

    def forward(self, **inputs: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoders[0](**inputs)[0][:, 0])
        return scores


@torch.no_grad()
def test_the_only_model_inside_of_a_module_is_patched(pretrained: Any, batch: Any) -> None:
    model = Classifier(pretrained("minilm", num_hidden_layers=2)).eval()
    softmax = model(**batch("minilm"))
    assert hp.patch_model(model, "poly3^16-l1") is model
    assert len(patched_layers(model)) == 2
    hp.calibrate(model, [batch("minilm", 8, 60)], progress=False)
    found = model(**batch("minilm"))
    assert not torch.equal(found, softmax)
    torch.testing.assert_close(found, softmax, rtol=1e-3, atol=1e-3)
    with hp.softmax_attention(model):
        assert torch.equal(model(**batch("minilm")), softmax)
    assert torch.equal(hp.unpatch_model(model)(**batch("minilm")), softmax)


def test_of_two_models_inside_none_is_chosen(pretrained: Any) -> None:
    model = Classifier(*(pretrained("minilm", num_hidden_layers=1) for _ in range(2)))
    with pytest.raises(PatchError, match=r"got Classifier, with 2 of them inside, at \['encoders.0', 'encoders.1'\]"):
        hp.patch_model(model, "poly3")
    with pytest.raises(PatchError, match=r"got Linear$"):
        hp.patch_model(model.head, "poly3")


def sentence_transformers() -> Any:
    return pytest.importorskip("sentence_transformers", reason="needs sentence-transformers: pip install it")


def test_a_sentence_transformer_is_patched_calibrated_saved_and_loaded(checkpoint: Any, tmp_path: Path) -> None:
    library = sentence_transformers()
    model = library.SentenceTransformer(str(checkpoint("minilm")), device="cpu")
    softmax = model.encode(TEXTS, convert_to_tensor=True)
    assert hp.patch_model(model, "poly6-l1") is model
    batches = [{key: value for key, value in model.tokenize(TEXTS * 4).items() if isinstance(value, Tensor)}]
    hp.calibrate(patched_model(model), batches, progress=False)
    expected = model.encode(TEXTS, convert_to_tensor=True)
    assert not torch.equal(expected, softmax)
    assert float(torch.nn.functional.cosine_similarity(expected, softmax).min()) > 0.99
    model.save(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert {"hf_polyattn", "poly6-l1"} <= set(card.data.tags)
    assert "`poly6-l1`" in card.text
    assert "import hf_polyattn" in card.text
    loaded = library.SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(loaded.encode(TEXTS, convert_to_tensor=True), expected)
    loaded.save(str(tmp_path / "again"))
    assert (tmp_path / "again" / "README.md").read_text().count("## Polynomial attention") == 1
    hp.unpatch_model(loaded)
    assert torch.equal(loaded.encode(TEXTS, convert_to_tensor=True), softmax)


def patched_model(model: Any) -> Any:
    from hf_polyattn.patching.patched import pretrained_model

    return pretrained_model(model)


def test_a_cross_encoder_is_patched(checkpoint: Any, tmp_path: Path) -> None:
    library = sentence_transformers()
    model = library.CrossEncoder(str(checkpoint("minilm")), num_labels=1, device="cpu")
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[0], TEXTS[2])]
    softmax = model.predict(pairs, convert_to_tensor=True)
    hp.patch_model(model, "poly3")
    expected = model.predict(pairs, convert_to_tensor=True)
    assert not torch.allclose(expected, softmax)
    model.save_pretrained(str(tmp_path))
    assert "`poly3`" in ModelCard.load(tmp_path / "README.md").text
    assert torch.equal(
        library.CrossEncoder(str(tmp_path), device="cpu").predict(pairs, convert_to_tensor=True), expected
    )
