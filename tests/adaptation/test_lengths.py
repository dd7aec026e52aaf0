"""Other lengths than those of the calibration: crops of the texts, and who says what was not seen. Real checkpoints."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lengths import blocks
from torch import Tensor
from torch.nn import functional as F
from transformers import StaticCache

import hf_polyattn as hp
from hf_polyattn.adaptation.crops import with_crops
from hf_polyattn.errors import CalibrationError
from hf_polyattn.patching.patched import patched_layers


@pytest.fixture(scope="module")
def long_texts(checkpoint: Any, shared: Any) -> list[dict[str, Tensor]]:
    checkpoint("minilm"), shared("datasets/wikitext2/validation.parquet")  # skips where one is not there
    return [blocks("validation", 128, 4, start) for start in (0, 504)]


@pytest.fixture(scope="module")
def softmax(pretrained: Any, long_texts: Any) -> Any:
    return pretrained("minilm", num_hidden_layers=3)


@pytest.fixture(scope="module")
def calibrated(softmax: Any, long_texts: Any) -> dict[bool | None, tuple[Any, hp.CalibrationReport]]:
    """By `crop`: a `poly3` that was calibrated on texts of 128 tokens."""
    found: dict[bool | None, Any] = {}
    for crop in (None, False):
        model = hp.patch_model(copy.deepcopy(softmax), "poly3")
        found[crop] = model, hp.calibrate(model, long_texts, row_shift="moments", squares=0, crop=crop, progress=False)
    return found


def cosine(model: Any, softmax: Any, length: int) -> float:
    inputs = blocks("test", length, 16)
    with torch.no_grad():
        ours, theirs = (m(**inputs).last_hidden_state.mean(1) for m in (model, softmax))
    return float(torch.cosine_similarity(ours, theirs, dim=-1).mean())


def test_texts_are_cut_into_pieces_of_all_sizes(softmax: Any, long_texts: Any) -> None:
    model = hp.patch_model(copy.deepcopy(softmax), "poly3")
    found = with_crops(model, long_texts, None)
    assert found[:2] == long_texts
    texts = [text for batch in long_texts for text in batch["input_ids"]]
    pieces: dict[int, list[Tensor]] = {}
    for batch in found[2:]:
        assert batch["attention_mask"].all()
        pieces.setdefault(batch["input_ids"].shape[1], []).extend(batch["input_ids"])
    assert sorted(pieces) == [16, 32, 64]
    for number, size in enumerate((64, 32, 16)):
        of_texts = texts[number::3]  # one size a text, in turn
        assert len(pieces[size]) == len(of_texts) * 128 // size
        assert torch.equal(pieces[size][1][1:-1], of_texts[0][size + 1 : 2 * size - 1])
        assert all(piece[0] == 101 and piece[-1] == 102 for piece in pieces[size])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_a_crop(side: str, softmax: Any, long_texts: Any) -> None:
    model = hp.patch_model(copy.deepcopy(softmax), "poly3")
    padding = (5, 0) if side == "left" else (0, 5)
    padded = [{name: torch.nn.functional.pad(t, padding) for name, t in batch.items()} for batch in long_texts]
    for ours, expected in zip(
        with_crops(model, padded, None)[2:], with_crops(model, long_texts, None)[2:], strict=True
    ):
        assert torch.equal(ours["input_ids"], expected["input_ids"])


def test_who_is_cropped(softmax: Any, long_texts: Any, pretrained: Any, batch: Any) -> None:
    model = hp.patch_model(copy.deepcopy(softmax), "poly3")
    mixed = [*long_texts, blocks("validation", 32, 8)]
    assert with_crops(model, mixed, None) == mixed
    assert len(with_crops(model, mixed, True)) > len(mixed)
    assert with_crops(model, long_texts, False) is long_texts
    inputs = [inputs["input_ids"] for inputs in long_texts]  # one tensor is the main input
    assert len(with_crops(model, inputs, None)) > 2
    labelled = [{**long_texts[0], "labels": torch.zeros(4)}]
    assert all("labels" not in crop for crop in with_crops(model, labelled, None)[1:])
    short = [blocks("validation", 24, 4)]
    placed = [{**long_texts[0], "position_ids": torch.arange(128).expand(4, -1)}]
    for given, reason in ((short, "the longest text has 24 tokens"), (placed, "position_ids")):
        assert with_crops(model, given, None) is given
        with pytest.raises(CalibrationError, match=f"crop=True, but .*{reason}.*without crop"):
            with_crops(model, given, True)
    for name, auto_class, reason in (
        ("gpt2-zinc", "AutoModelForCausalLM", "causal rows"),
        ("vit", "AutoModelForImageClassification", "takes pixel_values, not texts"),
    ):
        other = hp.patch_model(pretrained(name, auto_class, num_hidden_layers=1), "poly3")
        with pytest.raises(CalibrationError, match=reason):
            hp.calibrate(other, [batch(name)], crop=True, progress=False)
        assert not patched_layers(other)[0][1].config.interval


def test_crops_make_shorter_texts_hold(calibrated: Any, softmax: Any) -> None:
    (cropped, report), (whole, control) = calibrated[None], calibrated[False]
    assert report.lengths == (16, 128)
    assert control.lengths == (128, 128)
    assert "rows a layer of 16 to 128 keys" in str(report)
    assert cosine(cropped, softmax, 32) > 0.99
    assert cosine(cropped, softmax, 128) > 0.985
    assert cosine(whole, softmax, 32) < cosine(cropped, softmax, 32) - 0.01


def test_a_diagnosis_compares_outputs(calibrated: Any, softmax: Any) -> None:
    model, _ = calibrated[None]
    short, long = (hp.diagnose(model, [blocks("test", length, 2)], progress=False) for length in (32, 512))
    expected = hp.similarity(model, [blocks("test", 512, 2)])
    assert long.agreement == pytest.approx(expected)
    assert long.agreement < 0.9 < short.agreement
    assert f"outputs are not those of softmax with these weights (agreement {expected:.2f})" in long.verdict
    assert "outputs agree with softmax's" in short.verdict
    assert long.to_dict()["agreement"] == long.agreement


def warned(model: Any, length: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model(**blocks("test", length, 1))
    return [str(w.message) for w in caught if "calibrated on rows of" in str(w.message)]


@pytest.mark.parametrize("spec", ["poly3", "poly3~1", "poly4-l1", "poly3^16-l1"])
def test_far_outside_a_forward_pass_warns_once(spec: str, pretrained: Any, long_texts: Any, tmp_path: Path) -> None:
    model = hp.patch_model(pretrained("minilm", num_hidden_layers=1), spec)
    hp.calibrate(model, [blocks("validation", length, 2) for length in (32, 64)], row_shift="linear", progress=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for reloaded in (model, loaded, copy.deepcopy(loaded)):
        assert not warned(reloaded, 16)
        assert not warned(reloaded, 128)
        found = warned(reloaded, 129)
        assert len(found) == len(patched_layers(model))
        assert "129 keys, but this model was calibrated on rows of 32 to 64" in found[0]
        assert not warned(reloaded, 300)  # said
    fresh = type(model).from_pretrained(tmp_path).eval()
    assert "8 keys, but" in warned(fresh, 8)[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        hp.unpatch_model(fresh)(**blocks("test", 300, 1))


def test_padding_and_the_room_of_a_static_cache_are_no_length(pretrained: Any, long_texts: Any, batch: Any) -> None:
    model = hp.patch_model(pretrained("minilm", num_hidden_layers=1), "poly3")
    hp.calibrate(model, [blocks("validation", 32, 2)], row_shift="linear", progress=False)
    tokens = F.pad(blocks("test", 60, 2)["input_ids"], (0, 340))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=tokens, attention_mask=(torch.arange(400) < 60).expand(2, -1).long())
    with torch.no_grad(), pytest.warns(UserWarning, match="65 keys, but this model was calibrated on rows of 16 to 32"):
        model(input_ids=tokens, attention_mask=(torch.arange(400) < 65).expand(2, -1).long())

    decoder = hp.patch_model(pretrained("gpt2-zinc", "AutoModelForCausalLM", num_hidden_layers=1), "poly3")
    hp.calibrate(decoder, [batch("gpt2-zinc")], row_shift="linear", progress=False)
    most = patched_layers(decoder)[0][1].config.lengths[1]
    name = "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*calibrated on rows of.*")
        decoder(torch.arange(5)[None], **{name: StaticCache(decoder.config, max_cache_len=4 * most)})


def test_lengths_are_told(calibrated: Any, tmp_path: Path) -> None:
    model, _ = calibrated[None]
    assert str(hp.describe(model)).endswith("calibrated on rows of 16 to 128 keys")
    assert "calibrated on rows of 16 to 128 keys; other lengths were not seen." in re.sub(
        r"\s+", " ", str(hp.model_card(model))
    )
    bare = hp.patch_model(hp.unpatch_model(copy.deepcopy(model)), "poly3")
    assert "calibrated on" not in str(hp.describe(bare)) + str(hp.model_card(bare))
    assert not warned(bare, 512)
    for wrong in ((0, 4), (5, 4), (1,), "ab", (1.0, 2.0)):
        with pytest.raises(hp.errors.SpecError, match="lengths must be the fewest and the most keys"):
            hp.PolyAttentionConfig("poly3", lengths=wrong)
