"""Encoder–decoder models with polynomial cross-attention, on two that were trained to spell words backwards."""

from __future__ import annotations

import copy
import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pyarrow.parquet
import pytest
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_polyattn as hp
from hf_polyattn.adaptation.capture import observe
from hf_polyattn.adaptation.distillation import divergence_from
from hf_polyattn.patching.patched import patched_layers

FAMILIES = {"bart": (BartConfig, BartForConditionalGeneration, 600), "marian": (MarianConfig, MarianMTModel, 500)}
PAD, START, END, LETTER_A = 0, 1, 2, 3
LONGEST = 10
EXACT, CUBIC = "poly3^16-l1", "poly3"

both = pytest.mark.parametrize("family", FAMILIES)


# ---------------------------------------------------------------- the task, and models that can do it


def words_of(file: Path) -> list[str]:
    texts = pyarrow.parquet.read_table(file, columns=["text"])["text"].to_pylist()
    return sorted({word for text in texts for word in re.findall(f"[a-z]{{2,{LONGEST}}}", text.lower())})


def padded(words: list[str], length: int = 0) -> Tensor:
    """Returns the letters of words as tokens, each word with its end token (B, longest + 1, or length)."""
    tokens = torch.full((len(words), max(length, *map(len, words), 0) + (length == 0)), PAD)
    for row, word in zip(tokens, words, strict=True):
        row[: len(word) + 1] = torch.tensor([ord(letter) - ord("a") + LETTER_A for letter in word] + [END])
    return tokens


def backwards(words: list[str]) -> list[str]:
    return [word[::-1] for word in words]


def source(words: list[str], length: int = 0) -> dict[str, Tensor]:
    tokens = padded(words, length)
    return {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}


def with_labels(words: list[str]) -> dict[str, Tensor]:
    answers = padded(backwards(words))
    return {**source(words), "labels": answers.masked_fill(answers == PAD, -100)}


def with_decoder_inputs(words: list[str]) -> dict[str, Tensor]:
    """Returns the same as `with_labels`, the shift done by hand."""
    answers = padded(backwards(words))
    shifted = torch.cat([torch.full((len(words), 1), START), answers[:, :-1]], dim=1)
    return {**source(words), "decoder_input_ids": shifted, "decoder_attention_mask": (answers != PAD).long()}


@pytest.fixture(scope="session")
def words(shared: Callable[[str], Path]) -> tuple[list[str], list[str]]:
    """Words of children's stories, in random order, and 128 words of an encyclopedia that are not among them."""
    known = words_of(shared("datasets/tinystories/train.parquet"))
    unseen = sorted(set(words_of(shared("datasets/wikitext2/validation.parquet"))) - set(known))
    generator = torch.Generator().manual_seed(0)
    known, unseen = (
        [chosen[i] for i in torch.randperm(len(chosen), generator=generator)] for chosen in (known, unseen)
    )
    return known, unseen[:128]


@pytest.fixture(scope="session")
def trained(words: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`trained(family)`: the folder of a model that was trained, once for all workers of pytest-xdist."""

    def folder(family: str) -> Path:
        root = tmp_path_factory.getbasetemp()
        root = root.parent if root.name.startswith("popen-") else root
        with FileLock(root / f"{family}.lock"):
            if not (root / family / "config.json").exists():
                train(family, words[0]).save_pretrained(root / family)
        return root / family

    return folder


def train(family: str, words: list[str]) -> Any:
    config, model_class, steps = FAMILIES[family]
    sides = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 96}.items()
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = model_class(
        config(
            vocab_size=LETTER_A + 26, d_model=48, max_position_embeddings=16, scale_embedding=True, dropout=0.0,
            pad_token_id=PAD, bos_token_id=START, eos_token_id=END, decoder_start_token_id=START,
            forced_eos_token_id=None, **sides,
        )
    )  # fmt: skip
    inputs, targets = padded(words, LONGEST + 1), padded(backwards(words), LONGEST + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        chosen = torch.randint(len(words), (64,))
        x, labels = inputs[chosen], targets[chosen].masked_fill(targets[chosen] == PAD, -100)
        loss = model(input_ids=x, attention_mask=(x != PAD).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    return model


@pytest.fixture
def softmax(trained: Any) -> Callable[[str], Any]:
    """`softmax(family)`: a fresh copy of the trained model, in eval mode."""
    return lambda family: AutoModelForSeq2SeqLM.from_pretrained(trained(family)).eval()


@pytest.fixture(scope="module")
def calibrated_once(trained: Any, words: Any) -> Callable[..., Any]:
    @functools.cache
    def make(family: str, spec: str) -> Any:
        model = hp.patch_model(
            AutoModelForSeq2SeqLM.from_pretrained(trained(family)).eval(), spec, cross_attention=True
        )
        hp.calibrate(model, [with_labels(words[0][:256])], progress=False)
        return model

    return make


@pytest.fixture
def calibrated(calibrated_once: Any) -> Callable[..., Any]:
    """`calibrated(family, spec)`: the model with all its attention polynomial, calibrated on words of its training."""
    return lambda family, spec: copy.deepcopy(calibrated_once(family, spec))


def generate(model: Any, words: list[str], **settings: Any) -> Tensor:
    """Returns the generated tokens (B, longest + 1), the start token left out."""
    settings = {"max_new_tokens": LONGEST + 1, "do_sample": False, "num_beams": 1, **settings}
    tokens = model.generate(**source(words), **settings)[:, 1:]
    return F.pad(tokens, (0, LONGEST + 1 - tokens.shape[1]), value=PAD)


def agreement(found: Tensor, expected: Tensor) -> float:
    """Returns the share of equal tokens, the padding of both left out."""
    counted = (found != PAD) | (expected != PAD)
    return float((found == expected)[counted].float().mean())


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@both
def test_the_trained_models_know_their_task(family: str, softmax: Any, words: Any) -> None:
    unseen = words[1]
    answers = padded(backwards(unseen), LONGEST + 1)
    assert agreement(generate(softmax(family), unseen), answers) > 0.98
    assert agreement(generate(softmax(family), unseen), padded(unseen, LONGEST + 1)) < 0.5


# ---------------------------------------------------------------- what is patched


@both
def test_cross_attention_is_patched_where_asked_for(family: str, softmax: Any, words: Any) -> None:
    model = softmax(family)
    before = logits(model, with_labels(words[1]))
    crossing = [f"model.decoder.layers.{layer}.encoder_attn" for layer in (0, 1)]

    hp.patch_model(model, EXACT)
    status = {row[0]: row[-1] for row in hp.describe(model).rows}
    assert len(status) == 6
    assert {path for path, said in status.items() if said == "cross-attention, not asked for"} == set(crossing)
    assert {path for path, _ in patched_layers(model)} == set(status) - set(crossing)
    without = logits(model, with_labels(words[1]))
    hp.unpatch_model(model)

    hp.patch_model(model, EXACT, cross_attention=True)
    assert {row[-1] for row in hp.describe(model).rows} == {"patched"}
    assert len(patched_layers(model)) == 6
    assert not torch.equal(logits(model, with_labels(words[1])), without)
    with hp.softmax_attention(model):
        assert torch.equal(logits(model, with_labels(words[1])), before)
    hp.unpatch_model(model)
    assert torch.equal(logits(model, with_labels(words[1])), before)
    assert not torch.equal(without, before)


def test_relative_position_biases_are_refused_with_their_class() -> None:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()
    inputs = {"input_ids": torch.arange(5)[None], "decoder_input_ids": torch.arange(3)[None]}
    before = logits(model, inputs)
    for settings in ({}, {"cross_attention": True}, {"cross_attention": True, "exclude": ["*SelfAttention"]}):
        with pytest.raises(hp.PatchError, match=r"T5Attention \(it passes 'position_bias', a bias on its scores"):
            hp.patch_model(model, CUBIC, **settings)
    assert not hp.is_patched(model)
    assert torch.equal(logits(model, inputs), before)


# ---------------------------------------------------------------- generation


@both
def test_squared_cubics_generate_what_softmax_generates(family: str, softmax: Any, calibrated: Any, words: Any) -> None:
    unseen = words[1]
    for beams in (1, 3):
        expected = generate(softmax(family), unseen, num_beams=beams)
        assert agreement(generate(calibrated(family, EXACT), unseen, num_beams=beams), expected) >= 0.99
        bare = hp.patch_model(softmax(family), CUBIC, cross_attention=True)
        assert agreement(generate(bare, unseen, num_beams=beams), expected) < 0.6


@both
@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("spec", [EXACT, CUBIC])
def test_cached_generation_equals_uncached(
    family: str, beams: int, spec: str, calibrated: Any, words: Any, broken: Any
) -> None:
    model, unseen = calibrated(family, spec), words[1][:32]
    tokens = generate(model, unseen, num_beams=beams, use_cache=False)
    assert torch.equal(generate(model, unseen, num_beams=beams, use_cache=True), tokens)
    with broken("mask"):  # causality too: a cache shows less than the full pass
        wrong = [generate(model, unseen, num_beams=beams, use_cache=cached) for cached in (True, False)]
    assert not torch.equal(*wrong)


@both
@pytest.mark.parametrize("spec", [EXACT, CUBIC, "poly3~1"])
def test_a_static_cache_generates_what_a_dynamic_one_does(
    family: str, spec: str, calibrated: Any, words: Any, broken: Any
) -> None:
    model, unseen = calibrated(family, spec), words[1][:32]
    for beams in (1, 3):
        made = model.generate(
            **source(unseen), max_new_tokens=LONGEST + 1, num_beams=beams, cache_implementation="static",
            return_dict_in_generate=True,
        )  # fmt: skip
        caches = made.past_key_values.self_attention_cache, made.past_key_values.cross_attention_cache
        assert {type(layer).__name__ for cache in caches for layer in cache.layers} == {"StaticLayer"}
        expected = generate(model, unseen, num_beams=beams)
        found = made.sequences[:, 1:]
        assert torch.equal(F.pad(found, (0, LONGEST + 1 - found.shape[1]), value=PAD), expected)
    with broken("mask"):  # places that are not written yet would be seen
        assert not torch.equal(generate(model, unseen, cache_implementation="static"), generate(model, unseen))


@both
def test_later_steps_read_the_cross_attention_keys_from_the_cache(family: str, calibrated: Any, words: Any) -> None:
    model, seen, projections = calibrated(family, EXACT), [], []
    attention = model.get_submodule("model.decoder.layers.1.encoder_attn")
    attention.k_proj.register_forward_hook(lambda *_: projections.append(None))
    attention.polyattn.register_forward_hook(lambda _, tensors, __: seen.append(tuple(t.shape[2] for t in tensors)))
    tokens = generate(model, words[1][:16], use_cache=True)
    length = source(words[1][:16])["input_ids"].shape[1]
    steps = int((tokens != PAD).sum(1).max())
    assert len(projections) == 1
    assert seen == [(1, length, length)] * steps
    generate(model, words[1][:16], use_cache=False)
    assert len(projections) == 1 + steps
    assert seen[-1] == (steps, length, length)


@both
@pytest.mark.parametrize("spec", [EXACT, CUBIC])
def test_padding_of_the_encoder_changes_nothing(family: str, spec: str, calibrated: Any, words: Any) -> None:
    model, unseen = calibrated(family, spec).double(), words[1]  # moments of other sums round otherwise
    answers = with_labels(unseen)["labels"]
    longer = source(unseen, LONGEST + 5)
    assert longer["input_ids"].shape[1] > source(unseen)["input_ids"].shape[1]
    expected = logits(model, {**source(unseen), "labels": answers})
    torch.testing.assert_close(logits(model, {**longer, "labels": answers}), expected, rtol=1e-4, atol=1e-4)
    shown = {**longer, "attention_mask": torch.ones_like(longer["attention_mask"])}
    assert (logits(model, {**shown, "labels": answers}) - expected).abs().max() > 0.1


# ---------------------------------------------------------------- calibration and distillation


@both
def test_labels_and_decoder_inputs_calibrate_the_same(family: str, softmax: Any, words: Any) -> None:
    known, polynomials, rows = words[0][:64], [], []
    for batch in (with_labels(known), with_decoder_inputs(known)):
        model = hp.patch_model(softmax(family), "poly6-l1", cross_attention=True)
        rows.append(hp.calibrate(model, [batch], progress=False).rows)
        polynomials.append([layer.state_dict() for _, layer in patched_layers(model)])
    assert rows[0] == rows[1]
    for first, second in zip(*polynomials, strict=True):
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-3)
            assert name in ("delta", "radius", "settings") or tensor.abs().max() > 0


def test_each_side_leaves_its_own_padding_out(softmax: Any, words: Any) -> None:
    model, batch = hp.patch_model(softmax("bart"), CUBIC, cross_attention=True), with_labels(words[0][:8])
    batch["labels"][:, 2:] = -100  # as long as the encoder's tokens, and padded otherwise
    found: dict[str, Tensor | None] = {}
    observe(model, [batch], lambda path, _, seen: found.update({path: seen.real}), progress=False)
    encoder, decoder = batch["attention_mask"].bool(), batch["labels"] != -100
    assert encoder.shape == decoder.shape
    assert not torch.equal(encoder, decoder)
    assert len(found) == 6
    for path, real in found.items():
        assert real is not None
        assert torch.equal(real, decoder if ".decoder." in path else encoder), path

    unsaid = {name: tensor for name, tensor in with_decoder_inputs(words[0][:8]).items() if name[-4:] != "mask"}
    observe(model, [unsaid], lambda path, _, seen: found.update({path: seen.real}), progress=False)
    assert set(found.values()) == {None}


@both
def test_distillation_brings_a_cubic_closer_to_softmax(family: str, softmax: Any, calibrated: Any, words: Any) -> None:
    known, unseen = words
    teacher, model = softmax(family), calibrated(family, CUBIC)
    expected = generate(teacher, unseen)
    before = agreement(generate(model, unseen), expected)
    close = hp.similarity(model, [with_labels(unseen)], teacher)
    batches = [with_labels(known[start : start + 64]) for start in range(0, 512, 64)]
    report = hp.distill(model, batches, steps=16, lr=3e-4, progress=False)
    assert report.losses[-1] < report.losses[0]
    assert hp.similarity(model, [with_labels(unseen)], teacher) > close
    assert agreement(generate(model, unseen), expected) > before < 1.0


def test_padding_of_the_decoder_is_no_part_of_the_loss(softmax: Any, words: Any) -> None:
    teacher, batch = softmax("bart"), with_labels(words[1][:16])
    model = hp.patch_model(copy.deepcopy(teacher), CUBIC)  # far off, and not equally at all positions
    longer = {**batch, "labels": F.pad(batch["labels"], (0, 3), value=-100)}
    with torch.no_grad():
        losses = [float(divergence_from(teacher, model, inputs)) for inputs in (batch, longer)]
        shown = float(divergence_from(teacher, model, {**longer, "labels": longer["labels"].clamp(min=PAD)}))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert abs(shown - losses[0]) > 0.01 * losses[0]


# ---------------------------------------------------------------- exporting


class Logits(torch.nn.Module):
    """The logits alone, for an exporter that takes and returns tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        inputs = {"attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}
        return self.model(input_ids=input_ids, **inputs, use_cache=False).logits


@pytest.mark.parametrize(("family", "spec"), [("bart", "poly4-l1"), ("marian", CUBIC), ("marian", "poly3~1")])
def test_the_older_onnx_exporter_writes_the_numbers_of_the_model(
    family: str, spec: str, calibrated: Any, words: Any, tmp_path: Path
) -> None:
    model = calibrated(family, spec)

    def inputs(words: list[str]) -> dict[str, Tensor]:
        made = with_decoder_inputs(words)
        return {name: made[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}

    first = inputs(words[1][:3])
    axes = {name: {0: "batch", 1: "decoded" if "decoder" in name else "encoded"} for name in first}
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(
        Logits(model).eval(), tuple(first.values()), path, input_names=[*first], dynamic_axes=axes, dynamo=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for some in (first, inputs(words[1][5:12])):  # the second of another batch and other lengths
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in some.items()})
        expected = logits(model, some)
        assert (torch.from_numpy(found) - expected).abs().max() < 1e-4 * expected.abs().max()
        with hp.softmax_attention(model):
            assert (torch.from_numpy(found) - logits(model, some)).abs().max() > 1e-3 * expected.abs().max()


# ---------------------------------------------------------------- saving and loading

RELOAD = """
import sys, torch
import hf_polyattn as hp
from hf_polyattn.patching.patched import patched_layers
from transformers import AutoModelForSeq2SeqLM
torch.set_num_threads({threads})
case = torch.load(sys.argv[1] + ".pt")
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    print(len(patched_layers(model)), torch.equal(model(**case["inputs"]).logits, case["logits"]))
    print(torch.equal(model.generate(**case["source"], max_new_tokens=11, num_beams=3), case["tokens"]))
    print(torch.equal(hp.unpatch_model(model)(**case["inputs"]).logits, case["softmax"]))
"""


@both
def test_a_new_process_generates_the_same(
    family: str, calibrated: Any, softmax: Any, words: Any, tmp_path: Path
) -> None:
    model, unseen, folder = calibrated(family, CUBIC), words[1][:16], tmp_path / "model"
    inputs = with_labels(unseen)
    case = {"inputs": inputs, "source": source(unseen), "logits": logits(model, inputs)}
    case["tokens"] = model.generate(**source(unseen), max_new_tokens=LONGEST + 1, num_beams=3)
    case["softmax"] = logits(softmax(family), inputs)
    assert not torch.equal(case["logits"], case["softmax"])
    model.save_pretrained(folder)
    torch.save(case, tmp_path / "model.pt")
    code = RELOAD.format(threads=torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "True", "True", "True"]
