"""What the explorer computes is what the package computes, for each kind of model; mistakes are sentences."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, BertForSequenceClassification

import hf_polyattn as hp
from hf_polyattn.examples import Examples, documentation_sentences, encode, read_examples
from hf_polyattn.explore import Session
from hf_polyattn.explore.answers import answers, kind_of

Make = Callable[..., Session]


@pytest.fixture(scope="module")
def molecules(session: Make) -> Session:
    """gpt2-zinc, turned to poly3^16-l1."""
    made = session("gpt2-zinc", 8)
    made.turn("poly3^16-l1")
    return made


def test_a_position_is_what_calibrate_and_similarity_say(molecules: Session, session: Make) -> None:
    position = molecules.position
    assert position is not None
    other = session("gpt2-zinc", 8)
    hp.patch_model(other.model, "poly3^16-l1")
    report = hp.calibrate(other.model, molecules._batches, progress=False)
    assert position.report == report
    assert position.held_out == 2
    unseen = encode(other.processor, other.examples[6:], 8, 128)
    assert position.agreement == pytest.approx(hp.similarity(other.model, unseen))
    assert position.agreement != pytest.approx(hp.similarity(other.model, molecules._batches))  # the control
    assert position.agreement > 0.99
    assert 0.2 < position.time_ratio < 5.0


def test_turning_further_leaves_the_softmax_model_behind_it_alone(molecules: Session, session: Make) -> None:
    softmax = session("gpt2-zinc", 1).model
    tokens = {"input_ids": torch.tensor([[5, 9, 12, 7]])}
    with hp.softmax_attention(molecules.model):
        assert torch.equal(molecules.model(**tokens).logits, softmax(**tokens).logits)


def test_maps_name_tokens_and_curves_have_histograms(molecules: Session) -> None:
    found = molecules.map("CC(=O)Nc1ccc(O)cc1", 2, 0)
    assert len(found.keys) == found.softmax.shape[1] > 3
    numpy.testing.assert_allclose(found.softmax.sum(1), 1.0, atol=1e-5)
    assert "attention weights of softmax and of the polynomial" in found.describe()
    _, (curve,) = molecules.curves(2)
    assert sum(curve.counts) == pytest.approx(1.0)


def test_next_tokens_are_those_of_both_models(molecules: Session) -> None:
    found = molecules.answer(["CC(=O)N"])
    inputs = molecules.processor(["CC(=O)N"], return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ours = molecules.model(**inputs).logits[0, -1].softmax(-1)
    with hp.softmax_attention(molecules.model):
        softmax = molecules.model(**inputs).logits[0, -1].softmax(-1)
    assert found.rows[0][2] == f"{float(softmax.max()):.4f}"
    assert found.rows[0][4] == f"{float(ours.max()):.4f}"
    assert found.rows[0][1] == repr(molecules.processor.decode([int(softmax.argmax())]))
    assert "Greedy continuation" in found.note


def test_saved_model_loads_with_the_same_bits(molecules: Session, tmp_path: Path) -> None:
    path = molecules.save(str(tmp_path / "kept"))
    again = AutoModelForCausalLM.from_pretrained(path).eval()
    tokens = {"input_ids": torch.tensor([[5, 9, 12, 7]])}
    assert torch.equal(again(**tokens).logits, molecules.model(**tokens).logits)
    with pytest.raises(hp.InputError, match="kept is there already"):
        molecules.save(str(tmp_path / "kept"))
    (tmp_path / "file").write_text("")
    with pytest.raises(hp.InputError, match="cannot be written"):
        molecules.save(str(tmp_path / "file/below"))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "kept"]
    loaded = Session(str(path), "cpu", molecules.examples)
    assert loaded.spec == "poly3^16-l1"
    _, curves = loaded.curves(0)  # without a calibration of its own
    assert not curves[0].counts
    (tmp_path / "bare").mkdir()
    molecules.model.save_pretrained(tmp_path / "bare")
    with pytest.raises(hp.InputError, match=r"AutoTokenizer\.from_pretrained\(original\)\.save_pretrained\('.*bare'\)"):
        Session(str(tmp_path / "bare"), "cpu")


def same_in_a_script(session: Session, folder: Path) -> bool:
    """Runs the lines that a session shows, as they stand, and says whether they saved the session's model."""
    exec(session.code(str(folder)), {})
    again = Session(str(folder), "cpu", session.examples)
    tokens = {"input_ids": torch.tensor([[5, 9, 12, 7]])}
    return torch.equal(again.model(**tokens).logits, session.model(**tokens).logits)


def test_the_code_does_what_was_done(molecules: Session, session: Make, tmp_path: Path) -> None:
    assert same_in_a_script(molecules, tmp_path / "given")
    made = session("gpt2-zinc", 8)
    assert "calibrate(" not in made.code()  # still softmax
    hp.patch_model(made.model, "poly3", layers=[0])  # one layer, to be quick
    made.turn("poly3", documentation_sentences()[:8])  # other texts, given on the page
    assert "documentation_sentences" not in made.code()
    loaded = Session(str(made.save(str(tmp_path / "kept"))), "cpu")
    assert loaded.loaded_polynomial
    assert "calibrate(" not in loaded.code()  # which would undo what was trained
    assert same_in_a_script(loaded, tmp_path / "as-loaded")
    loaded.examples = Examples(loaded.examples[:8], loaded.examples.call)  # type: ignore[attr-defined]
    loaded.turn("poly4-l1")
    assert "documentation_sentences()[:6]" in loaded.code()
    assert same_in_a_script(loaded, tmp_path / "turned")


def test_the_code_reads_a_data_set_again(session: Make, shared: Callable[[str], Path], tmp_path: Path) -> None:
    made = session("gpt2-zinc", 1)
    made.examples = read_examples(made.processor, str(shared("datasets/zinc/test.parquet")), None, "train", None, 8)
    made.turn("poly3", [" ".join(one.split()) for one in made.examples])  # as they come back from the page
    assert "read_examples(processor, " in made.code()
    assert same_in_a_script(made, tmp_path / "again")


def test_the_code_runs_in_any_folder(
    session: Make, shared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shared("datasets/zinc/test.parquet")
    monkeypatch.chdir(data.parent)
    made = session("gpt2-zinc", 1)
    made.name = os.path.relpath(made.name)  # as one may start the explorer
    made.examples = read_examples(made.processor, data.name, None, "train", None, 8)
    made.turn("poly3", [" ".join(one.split()) for one in made.examples])
    code = made.code("kept")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert Session("kept", "cpu", made.examples).spec == "poly3"
    made.name = "owner/model"
    assert '.from_pretrained("owner/model")' in made.code()


def test_the_code_takes_pictures_of_the_page_as_arguments(
    session: Make, rows: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = session("vit", 0)
    hp.patch_model(made.model, "poly3", layers=[0])  # one layer, to be quick
    softmax = made.save(str(tmp_path / "one-layer"))
    made = Session(str(softmax), "cpu")
    pictures = rows("vit", 2)
    made.turn("poly3", pictures)
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    monkeypatch.setattr("sys.argv", ["script.py", str(tmp_path / "0.png"), str(tmp_path / "1.png")])
    exec(made.code(str(tmp_path / "again")), {})
    again = Session(str(tmp_path / "again"), "cpu")
    inputs = encode(made.processor, pictures, 2, 0)[0]
    assert torch.equal(again.model(**inputs).logits, made.model(**inputs).logits)


def test_images_have_maps_over_the_picture_and_classes(session: Make) -> None:
    made = session("vit", 2)
    hp.patch_model(made.model, "poly3^16-l1", layers=[4])  # one layer, to be quick
    made.turn("poly3^16-l1")
    assert made.position is not None
    assert made.position.agreement > 0.999
    found = made.map(made.examples[0], 0, 1, query=0)
    assert found.grid == (14, 14)
    assert found.softmax.shape == (1, 197)
    classes = made.answer(made.examples[:1])
    assert classes.title == "Classes"
    assert classes.rows[0][1] == classes.rows[0][3] in made.model.config.id2label.values()


def test_sentences_are_compared_by_encoders(session: Make) -> None:
    made = session("minilm", 2)
    hp.patch_model(made.model, "poly3^16-l1")
    found = made.answer(["A dog runs.", "A puppy plays.", "Stocks fell."])
    assert len(found.rows) == 3
    dogs, *others = (float(row[2]) for row in found.rows)
    assert dogs > max(others)
    assert found.rows[0][2:] == (f"{dogs:.4f}", found.rows[0][3])
    assert float(found.rows[0][3]) == pytest.approx(dogs, abs=0.05)


def test_masks_are_filled_in_and_a_text_without_one_is_told(session: Make) -> None:
    processor = session("minilm", 1).processor
    config = BertConfig(vocab_size=len(processor), hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = hp.patch_model(BertForMaskedLM(config).eval(), "poly3")
    assert kind_of(model) == "masked"
    found = answers(model, processor, ["Paris is in [MASK]."], 32)
    assert len(found.rows) == 5
    assert float(found.note.split()[6]) > 0.0  # they differ: nothing is calibrated
    with pytest.raises(hp.InputError, match=r"write \[MASK\] where"):
        answers(model, processor, ["Paris is in France."], 32)
    classes = hp.patch_model(BertForSequenceClassification(config).eval(), "poly3")
    assert [row[1] for row in answers(classes, processor, ["Paris."], 32).rows] != []


def test_what_cannot_be_done_is_a_sentence_and_changes_nothing(session: Make) -> None:
    made = session("gpt2-zinc", 4)
    with pytest.raises(hp.InputError, match="still the softmax model: calibrate a polynomial first"):
        made.map("CC", 0, 0)
    with pytest.raises(hp.SpecError, match="Grammar"):
        made.turn("poly99")
    with pytest.raises(hp.InputError, match="nothing to look at: give a text"):
        made.turn("poly3", ["", "   "])
    with torch.no_grad():
        made.model.lm_head.weight.fill_(torch.nan)  # the embedding too
    with pytest.raises(hp.CalibrationError, match="non-finite"):
        made.turn("poly3")
    assert made.spec is None
    assert made.layers == []
    with pytest.raises(hp.InputError, match=r"cannot load '\.\./nowhere'"):
        Session("../nowhere")


def test_a_page_may_ask_for_several_things_at_once(molecules: Session) -> None:
    failed: list[BaseException] = []

    def ask(what: Callable[[], Any]) -> None:
        try:
            what()
        except BaseException as error:
            failed.append(error)

    asked = [lambda: molecules.map("CCO", 0, 0), lambda: molecules.answer(["CCO"]), lambda: molecules.curves(1)]
    threads = [threading.Thread(target=ask, args=(what,)) for what in asked * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_there_are_plain_sentences_without_a_data_set() -> None:
    sentences = documentation_sentences()[:96]
    assert len(sentences) == 96
    assert all(one[0].isupper() and one.endswith(".") for one in sentences)
