"""A patched model trains, compiles and runs in pipelines and `Trainer` as a Transformers model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_double import BASE, Recorder, all_four, as_double, output, same, textbook_weights, visible_pairs
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import hf_polyattn as hp
from hf_polyattn.patching.patched import patched_layers

# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("minilm", {"attention_probs_dropout_prob": 0.3, "hidden_dropout_prob": 0.0}),
        ("gpt2-tinystories", {"attn_pdrop": 0.3, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
        ("llama", {"attention_dropout": 0.3}),
    ],
    ids=["minilm", "gpt2", "llama"],
)
def test_attention_dropout_acts_in_training_only(name: str, settings: Any, double: Any, batch: Any) -> None:
    model, inputs = double(name, **settings), batch(name)

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return output(model, **inputs)

    evaluated = seeded(0)
    assert torch.equal(seeded(1), evaluated)
    model.train()
    assert torch.equal(seeded(0), seeded(0))
    assert not same(name, seeded(0), seeded(1))
    assert not same(name, seeded(0), evaluated)
    model.eval()
    assert torch.equal(seeded(2), evaluated)


@pytest.mark.parametrize("name", ["gpt2-tinystories", "llama", "minilm"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, double: Any, batch: Any) -> None:
    dropout = {"llama": {"attention_dropout": 0.3}, "gpt2-tinystories": {"attn_pdrop": 0.3}}
    model, inputs = double(name, **dropout.get(name, {})).train(), batch(name)

    def gradients(seed: int) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(seed)
        model.zero_grad()
        with Recorder(model) as recorder:
            model(**inputs)[0].square().mean().backward()
        found = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
        return found, len(recorder.calls) // len(recorder.layers)

    expected, passes = gradients(0)
    assert passes == 1
    model.gradient_checkpointing_enable()
    actual, passes = gradients(0)
    assert passes == 2
    assert actual.keys() == expected.keys()
    assert sum("polyattn.delta" in key for key in actual) == len(patched_layers(model))
    assert all(same(name, actual[key], expected[key]) for key in actual)
    assert not all(same(name, gradient, expected[key]) for key, gradient in gradients(1)[0].items())


@pytest.fixture
def fresh_compiler() -> None:
    """Forgets earlier graphs: models of all classes share wrappers whose recompilations are limited."""
    torch.compiler.reset()


@all_four
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_equals_eager(name: str, double: Any, batch: Any) -> None:
    model, inputs = double(name, layers=1), as_double(batch(name))
    expected = output(model, **inputs)
    assert same(name, output(torch.compile(model, fullgraph=True), **inputs), expected)
    with hp.softmax_attention(model):
        assert not same(name, output(model, **inputs), expected)


@all_four
@pytest.mark.usefixtures("fresh_compiler")
def test_gradients_through_a_compiled_graph_equal_eager(name: str, double: Any, batch: Any) -> None:
    model, inputs = double(name, layers=1), as_double(batch(name))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def run(forward: Any) -> dict[str, Tensor]:
        model.zero_grad()
        forward(**inputs)[0].square().mean().backward()
        return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}

    expected, actual = run(model), run(compiled)
    assert all(same(name, actual[key], expected[key]) for key in expected)
    assert sum("polyattn" in key for key in expected) == 3
    # The compiled model follows softmax_attention.
    with hp.softmax_attention(model):
        softmax = run(compiled)
        assert all(same(name, softmax[key], gradient) for key, gradient in run(model).items())
    assert not any("polyattn" in key and gradient.any() for key, gradient in softmax.items())


@all_four
def test_autocast_rounds_the_operands_of_products_and_nothing_else(
    name: str, pretrained: Any, polynomial: Any, batch: Any
) -> None:
    model, inputs = polynomial(pretrained(name, BASE[name])), batch(name)
    with Recorder(model) as recorder, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = model(**inputs)[0]
    assert result.isfinite().all()
    for layer, ((query, key, value), settings, out) in zip(recorder.layers, recorder.calls, strict=True):
        assert out.dtype == torch.bfloat16
        # As autocast rounds them; float64 from there on.
        query, key, value = (tensor.to(torch.bfloat16).double() for tensor in (query, key, value))
        every = torch.ones(1, 1, query.shape[2], key.shape[2])
        visible = every if name == "vit" else visible_pairs(name, inputs["attention_mask"])
        weights = textbook_weights(layer, query, key, settings["scaling"], visible)
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        expected = torch.einsum("bhij,bhjd->bihd", weights, values)
        # Half a unit in the last place of bfloat16, of the output and of each weight before its product.
        terms = torch.einsum("bhij,bhjd->bihd", weights.abs(), values.abs())
        assert ((out - expected).abs() <= 2**-8 * (expected.abs() + terms) + 1e-4 * terms).all()
        if name != "vit":
            unmasked = textbook_weights(layer, query, key, settings["scaling"], every)
            assert ((out - torch.einsum("bhij,bhjd->bihd", unmasked, values)).abs() > 2**-4 * terms).any()


# ---------------------------------------------------------------- pipelines and Trainer


@pytest.fixture
def saved(pretrained: Any, polynomial: Any, checkpoint: Any, tmp_path: Path) -> Any:
    """`saved(name)`: the path of a patched checkpoint with its tokenizer or image processor."""

    def save(name: str) -> Path:
        polynomial(pretrained(name, BASE[name])).save_pretrained(tmp_path)
        processor = AutoImageProcessor if name == "vit" else AutoTokenizer
        processor.from_pretrained(checkpoint(name)).save_pretrained(tmp_path)
        return tmp_path

    return save


def test_text_generation_pipeline(saved: Any, checkpoint: Any, rows: Any, pretrained: Any, polynomial: Any) -> None:
    prompt, name = rows("gpt2-tinystories", 1)[0][:40], "gpt2-tinystories"
    settings = {"max_new_tokens": 12, "do_sample": False}
    generated = pipeline("text-generation", str(saved(name)))(prompt, **settings)[0]["generated_text"]
    model, tokenizer = polynomial(pretrained(name, BASE[name])), AutoTokenizer.from_pretrained(checkpoint(name))
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), **settings, use_cache=False)[0]
    assert generated == tokenizer.decode(tokens, skip_special_tokens=True)
    assert generated != pipeline("text-generation", str(checkpoint(name)))(prompt, **settings)[0]["generated_text"]


def test_feature_extraction_pipeline(saved: Any, checkpoint: Any, rows: Any, pretrained: Any, polynomial: Any) -> None:
    sentence = rows("minilm", 1)[0]
    features = pipeline("feature-extraction", str(saved("minilm")))(sentence, return_tensors=True)
    model, tokenizer = polynomial(pretrained("minilm")), AutoTokenizer.from_pretrained(checkpoint("minilm"))
    assert torch.equal(features, output(model, **tokenizer(sentence, return_tensors="pt")))
    softmax = pipeline("feature-extraction", str(checkpoint("minilm")))(sentence, return_tensors=True)
    assert (softmax - features).abs().max() > 0.1


def test_image_classification_pipeline(
    saved: Any, checkpoint: Any, rows: Any, pretrained: Any, polynomial: Any
) -> None:
    image = rows("vit", 1)[0]
    found = pipeline("image-classification", str(saved("vit")))(image, top_k=3)
    model = polynomial(pretrained("vit", BASE["vit"]))
    inputs = AutoImageProcessor.from_pretrained(checkpoint("vit"))(image, return_tensors="pt")
    probabilities = output(model, **inputs)[0].softmax(-1)
    with hp.softmax_attention(model):
        softmax = output(model, **inputs)[0].softmax(-1)
    scores = torch.tensor([entry["score"] for entry in found])
    torch.testing.assert_close(scores, probabilities.topk(3).values, rtol=1e-5, atol=0.0)  # the pipeline's own softmax
    assert not torch.allclose(scores, softmax.topk(3).values, rtol=0.1)


def test_trainer_trains_saves_and_resumes(
    pretrained: Any, polynomial: Any, checkpoint: Any, shared: Any, tmp_path: Path
) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(shared("datasets/sst2/train.parquet")).slice(0, 24).to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("minilm"))
    encoded = tokenizer([row["sentence"] for row in table], truncation=True, max_length=16)
    data = [
        {"input_ids": ids, "attention_mask": mask, "labels": row["label"]}
        for ids, mask, row in zip(encoded["input_ids"], encoded["attention_mask"], table, strict=True)
    ]

    def trainer(model: Any, **settings: Any) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.5,
            lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **settings,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=data, processing_class=tokenizer)

    torch.manual_seed(0)
    model = polynomial(pretrained("minilm", "AutoModelForSequenceClassification", num_hidden_layers=2))
    start = {key: value.clone() for key, value in model.state_dict().items()}
    first = trainer(model, max_steps=3, save_steps=2)
    first.train()
    for key, value in model.state_dict().items():
        fixed = tuple(f"polyattn.{name}" for name in ("coefficients", "directions", "radius", "settings"))
        assert torch.equal(value, start[key]) is key.endswith(fixed), key

    decay = {group["weight_decay"]: group["params"] for group in first.optimizer.param_groups}
    assert set(decay) == {0.0, 0.5}
    decayed = {id(parameter) for parameter in decay[0.5]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert "classifier.weight" in names
    assert not any("polyattn" in name for name in names)

    first.save_model(str(tmp_path / "final"))
    inputs = tokenizer([row["sentence"] for row in table[:2]], padding=True, return_tensors="pt")
    model.eval()
    trained = output(model, **inputs)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert torch.equal(output(reloaded, **inputs), trained)
    with hp.softmax_attention(reloaded):
        assert not torch.equal(output(reloaded, **inputs), trained)

    # A second run resumes from step 2, weights and optimizer, and ends where the first did.
    resumed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    halfway = output(resumed, **inputs)
    assert not torch.equal(halfway, trained)
    second = trainer(resumed, max_steps=3, save_strategy="no")
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed.eval()
    assert torch.equal(output(resumed, **inputs), trained)
