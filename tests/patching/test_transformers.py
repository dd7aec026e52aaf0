"""A patched model behaves like a Transformers model: caches, padding, masks, generation, training, compilation.

Models run in float64 wherever two ways must agree, so that the bound is rounding alone: 1e-9 of the largest
number. Llama's norms and rotary embeddings compute in float32 even then, and its scores reach ±280: 1e-4.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithFlattening,
    DynamicCache,
    Gemma2Config,
    Gemma2Model,
    GptOssConfig,
    GptOssModel,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

import hf_polyattn as hp
from hf_polyattn.patching.core import PolyAttention
from hf_polyattn.patching.patch import patched_layers

BASE = {
    "minilm": "AutoModel",
    "gpt2-tinystories": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
}
all_four = pytest.mark.parametrize("name", list(BASE))
decoders = pytest.mark.parametrize("name", ["gpt2-tinystories", "llama"])


@pytest.fixture
def double(pretrained: Any, polynomial: Any) -> Any:
    """`double(name, config=None, layers=None, **kwargs)`: a checkpoint with polynomials, in float64."""

    def make(name: str, config: Any = None, layers: int | None = None, **kwargs: Any) -> Any:
        if layers is not None:
            kwargs["n_layer" if name.startswith("gpt2") else "num_hidden_layers"] = layers
        return polynomial(pretrained(name, BASE[name], **kwargs), config).double()

    return make


@torch.no_grad()
def output(model: Any, **inputs: Any) -> Tensor:
    return model(**inputs)[0]


def same(name: str, actual: Tensor, expected: Tensor) -> bool:
    """Whether two float64 results differ by rounding alone."""
    bound = (1e-4 if name == "llama" else 1e-9) * expected.abs().max()
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= bound)


def as_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def visible_pairs(name: str, attention_mask: Tensor) -> Tensor:
    """What each query may see, (B, 1, T, T): real keys, and no later ones in a decoder."""
    length = attention_mask.shape[1]
    pairs = attention_mask.bool()[:, None, None, :].expand(-1, 1, length, length)
    return pairs if name == "minilm" else pairs.tril()


# ---------------------------------------------------------------- the formula


def textbook_weights(layer: PolyAttention, query: Tensor, key: Tensor, scaling: float, visible: Tensor) -> Tensor:
    """The formula of DESIGN.md, one line each, on expanded keys and whole matrices."""
    config = layer.config
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    t = scaling * torch.einsum("bhid,bhjd->bhij", query, key)
    if config.key_shift:
        t = t - scaling * torch.einsum("bhid,hd->bhi", query, layer.key_shift.to(query))[..., None]
    if config.interval:
        t = (t - layer.center[:, None, None]) / layer.radius[:, None, None]
    if config.clamp:
        t = t.clamp(-1, 1)
    powers = torch.stack([t**k for k in range(config.spec.degree + 1)], dim=-1)
    coefficients = layer.coefficients.to(query).expand(query.shape[1], -1)
    w = torch.einsum("bhijk,hk->bhij", powers, coefficients) ** config.spec.power * visible.to(query)
    n = visible.to(w).expand_as(w).sum(-1, keepdim=True).clamp(min=1)
    scale = {"rsqrt": n**-0.5, "mean": 1 / n, "none": 1.0, "l1": 1 / (1e-37 + w.abs().sum(-1, keepdim=True))}
    return w * scale[config.spec.normalizer]


class Recorder:
    """Records what the polynomial modules of a model get and return, while in use."""

    def __init__(self, model: Any) -> None:
        self.layers = [layer for _, layer in patched_layers(model)]
        self.calls: list[tuple[tuple[Tensor, ...], dict[str, Any], Any]] = []

    def __enter__(self) -> Recorder:
        self.hooks = [layer.register_forward_hook(self.record, with_kwargs=True) for layer in self.layers]
        return self

    def record(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.calls.append((args, kwargs, out))

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


SPECS = {
    "everything": None,
    "poly3": hp.PolyAttentionConfig("poly3"),
    "taylor2-l1": hp.PolyAttentionConfig("taylor2-l1", granularity="layer"),
    "poly2^4-mean": hp.PolyAttentionConfig("poly2^4-mean", interval=True, clamp=True),
    "poly5-none": hp.PolyAttentionConfig("poly5-none", interval=True, clamp=True),
}


@all_four
@pytest.mark.parametrize("spec", SPECS)
def test_output_attentions_are_the_weights_of_the_formula(name: str, spec: str, double: Any, batch: Any) -> None:
    model, inputs = double(name, SPECS[spec], layers=2), as_double(batch(name))
    with Recorder(model) as recorder, torch.no_grad():
        plain = model(**inputs)
        result = model(**inputs, output_attentions=True)
    assert plain.attentions is None
    assert same(name, result[0], plain[0])
    assert len(result.attentions) == 2
    without, with_weights = recorder.calls[:2], recorder.calls[2:]
    for layer, weights, first, second in zip(recorder.layers, result.attentions, without, with_weights, strict=True):
        (query, key, value), settings, returned = second
        assert query.dtype == torch.float64
        every = torch.ones(1, 1, query.shape[2], key.shape[2])
        visible = every if name == "vit" else visible_pairs(name, inputs["attention_mask"])
        expected = textbook_weights(layer, query, key, settings["scaling"], visible)
        assert same("", weights, expected)
        # Controls: a formula without the mask, without the normalizer, or without this head's polynomial.
        if name != "vit":
            assert not same("", weights, textbook_weights(layer, query, key, settings["scaling"], every))
        assert not same("", weights, expected * 1.1)
        assert not same("", weights, expected.roll(1, dims=1 if query.shape[1] > 1 and spec == "everything" else 3))
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        assert same("", returned[0], torch.einsum("bhij,bhjd->bihd", weights, values))
        assert same(name, first[2], returned[0])


# ---------------------------------------------------------------- caches and generation


def generate(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Returns the new tokens (B, new) and their logits (B, new, vocabulary) of greedy generation."""
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0, **kwargs}
    result = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    return result.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(result.logits, dim=1)


@decoders
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_generation_equals_uncached(name: str, cache: str, double: Any, batch: Any, broken: Any) -> None:
    model, inputs = double(name), batch(name, count=1, length=12)
    tokens, logits = generate(model, inputs, use_cache=False)
    cached_tokens, cached_logits = generate(model, inputs, cache_implementation=cache)
    assert torch.equal(cached_tokens, tokens)
    assert same(name, cached_logits, logits)
    for part in ("mask", "normalizer"):
        with broken(part):
            first = generate(model, inputs, use_cache=False)[1][:, 1]
            second = generate(model, inputs, cache_implementation=cache)[1][:, 1]
        assert not same(name, second, first), part
    with hp.softmax_attention(model):
        assert not torch.equal(generate(model, inputs)[0], tokens)


@pytest.fixture(scope="module")
def mistral() -> Any:
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=96, sliding_window=6, initializer_range=0.4,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_sliding_window_caches_equal_the_full_pass(cache: str, mistral: Any, polynomial: Any, broken: Any) -> None:
    model = polynomial(copy.deepcopy(mistral)).double()
    inputs = {"input_ids": torch.randint(3, 96, (2, 13), generator=torch.Generator().manual_seed(0))}
    tokens, logits = generate(model, inputs, use_cache=False)
    cached_tokens, cached_logits = generate(model, inputs, cache_implementation=cache)
    assert torch.equal(cached_tokens, tokens)
    assert same("llama", cached_logits, logits)
    with broken("mask"):
        assert not same("llama", generate(model, inputs, use_cache=False)[1], logits)

    # Two layers of window 6 see the last 11 tokens: the two before have no influence, the next one has.
    whole = torch.cat([inputs["input_ids"], tokens], dim=1)
    last, other = output(model, input_ids=whole)[:, -1], whole.clone()
    other[:, : whole.shape[1] - 11] = 5
    assert same("llama", output(model, input_ids=other)[:, -1], last)
    other[:, -11] = 5
    assert not same("llama", output(model, input_ids=other)[:, -1], last)


@decoders
@pytest.mark.parametrize("sizes", [(1, 11), (5, 7), (4, 4, 4)], ids=str)
def test_chunked_prefill_equals_the_full_pass(name: str, sizes: Any, double: Any, batch: Any, broken: Any) -> None:
    model, ids = double(name), batch(name, count=1, length=12)["input_ids"]

    def in_chunks() -> Tensor:
        cache = DynamicCache(config=model.config)
        chunks = [output(model, input_ids=chunk, past_key_values=cache) for chunk in ids.split(sizes, dim=1)]
        return torch.cat(chunks, dim=1)

    full = output(model, input_ids=ids)
    assert same(name, in_chunks(), full)
    for part in ("mask", "normalizer"):
        with broken(part):
            assert not same(name, in_chunks(), output(model, input_ids=ids)), part


@decoders
def test_left_padded_generation_equals_unpadded(name: str, double: Any, batch: Any, broken: Any) -> None:
    model, inputs = double(name), batch(name, length=14, side="left")
    lengths = inputs["attention_mask"].sum(-1).tolist()
    assert lengths == [14, 9]

    def alone(row: int) -> tuple[Tensor, Tensor]:
        return generate(model, {"input_ids": inputs["input_ids"][row : row + 1, -lengths[row] :]})

    tokens, logits = generate(model, inputs)
    for row in (0, 1):
        assert torch.equal(tokens[row : row + 1], alone(row)[0])
        assert same(name, logits[row : row + 1], alone(row)[1])
    for part in ("mask", "normalizer"):
        with broken(part):
            assert not same(name, generate(model, inputs)[1][1:, 1], alone(1)[1][:, 1]), part


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["minilm", "gpt2-tinystories", "llama"])
def test_padded_batches_equal_unpadded_rows(name: str, side: str, double: Any, batch: Any, broken: Any) -> None:
    model, inputs = double(name), batch(name, count=3, length=16, side=side)
    mask = inputs["attention_mask"].bool()
    assert not mask.all()
    place = {} if name == "minilm" and side == "right" else {"position_ids": positions(inputs["attention_mask"])}

    def padded() -> list[Tensor]:
        return [row[real] for row, real in zip(output(model, **inputs, **place), mask, strict=True)]

    def unpadded() -> list[Tensor]:
        ids = zip(inputs["input_ids"], mask, strict=True)
        return [output(model, input_ids=row[real][None])[0] for row, real in ids]

    assert output(model, **inputs, **place).isfinite().all()
    assert all(same(name, a, b) for a, b in zip(padded(), unpadded(), strict=True))
    if name != "minilm" and side == "right":
        return  # causality alone hides what is padded on the right
    for part in ("mask", "normalizer"):
        with broken(part):
            assert not same(name, padded()[2], unpadded()[2]), part


@decoders
def test_beam_search_is_the_same_with_and_without_cache(name: str, double: Any, batch: Any, broken: Any) -> None:
    model, inputs = double(name), batch(name, length=12, side="left")

    def beams(use_cache: bool) -> Any:
        return model.generate(
            **inputs, num_beams=3, max_new_tokens=10, do_sample=False, use_cache=use_cache, pad_token_id=0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip

    cached, uncached = beams(True), beams(False)
    assert torch.equal(cached.sequences, uncached.sequences)
    # Beam search accumulates scores in float32.
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, rtol=1e-4, atol=1e-4)
    with broken("mask"):
        changed = beams(True).sequences_scores - beams(False).sequences_scores
        assert changed.abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("name", ["minilm", "gpt2-tinystories", "llama"])
def test_4d_masks_equal_the_2d_mask(name: str, kind: str, double: Any, batch: Any, broken: Any) -> None:
    model, inputs = double(name), batch(name)
    place = {"position_ids": positions(inputs["attention_mask"])}
    visible = visible_pairs(name, inputs["attention_mask"])

    def with_mask(pairs: Tensor) -> Tensor:
        lowest = torch.finfo(torch.float64).min
        mask = pairs if kind == "bool" else torch.zeros(pairs.shape, dtype=torch.float64).masked_fill(~pairs, lowest)
        return output(model, input_ids=inputs["input_ids"], attention_mask=mask, **place)

    expected = output(model, **inputs, **place)
    assert same(name, with_mask(visible), expected)
    assert not same(name, with_mask(torch.ones_like(visible)), expected)
    hidden = visible.clone()
    hidden[..., 3:, 1] = False
    assert not same(name, with_mask(hidden), expected)
    with broken("mask"):
        assert not same(name, with_mask(visible), expected)


@decoders
def test_packed_sequences_equal_separate_ones(name: str, double: Any, batch: Any) -> None:
    model, ids = double(name), batch(name, count=1, length=20)["input_ids"]
    parts = ids.split([8, 12], dim=1)
    packed = torch.cat([torch.arange(8), torch.arange(12)])[None]
    together = output(model, input_ids=ids, position_ids=packed, use_cache=False)
    separate = torch.cat([output(model, input_ids=part) for part in parts], dim=1)
    assert same(name, together, separate)
    assert not same(name, output(model, input_ids=ids, use_cache=False), separate)


@decoders
@pytest.mark.parametrize("layers", [None, [1]], ids=["all-layers", "one-softmax"])
def test_flattened_batches_equal_separate_ones_with_a_cache_too(
    name: str, layers: Any, double: Any, batch: Any
) -> None:
    config = None if layers is None else hp.PolyAttentionConfig("poly3", layers=layers, interval=True, clamp=True)
    model, ids = double(name, config), batch(name, count=1, length=20)["input_ids"]
    parts = ids.split([8, 12], dim=1)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    flat = collator([{"input_ids": part[0]} for part in parts])
    del flat["labels"]
    separate = torch.cat([output(model, input_ids=part) for part in parts], dim=1)
    assert same(name, output(model, **flat, use_cache=True), separate)
    assert same(name, output(model, **flat, use_cache=False), separate)
    borderless = {key: value for key, value in flat.items() if not key.startswith("cu_seq")}
    assert not same(name, output(model, **borderless, use_cache=True), separate)


@pytest.mark.parametrize("padding", ["none", "2d", "additive"])
def test_borders_of_packed_sequences_join_windows_and_masks(padding: str, mistral: Any, polynomial: Any) -> None:
    model = polynomial(copy.deepcopy(mistral)).double()
    ids, borders = torch.arange(3, 23)[None], torch.tensor([0, 8, 20], dtype=torch.int32)
    masks = {"none": None, "2d": torch.ones_like(ids), "additive": torch.zeros(1, 1, 20, 20, dtype=torch.double)}
    masks["2d"][:, 17:] = 0
    masks["additive"].masked_fill_(~torch.ones(20, 20).bool().tril(), torch.finfo(torch.double).min)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    together = output(
        model, input_ids=ids, attention_mask=masks[padding], position_ids=positions,
        cu_seq_lens_q=borders, cu_seq_lens_k=borders,
    )  # fmt: skip
    rows = slice(0, 17 if padding == "2d" else 20)
    slices = {"2d": None, "none": None, "additive": masks["additive"]}[padding]
    separate = torch.cat(
        [
            output(model, input_ids=part, attention_mask=None if slices is None else slices[:, :, :n, :n])
            for part, n in zip(ids.split([8, 12], dim=1), (8, 12), strict=True)
        ],
        dim=1,
    )
    assert same("mistral", together[:, rows], separate[:, rows])


def test_borders_that_cannot_be_honoured_are_refused(double: Any, batch: Any) -> None:
    model, inputs = double("llama"), batch("llama", count=2)
    borders = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(hp.UnsupportedArgumentError, match="2 rows of"):
        model(**inputs, cu_seq_lens_q=borders, cu_seq_lens_k=borders)
    with pytest.raises(hp.UnsupportedArgumentError, match="one row of packed sequences"):
        model(input_ids=inputs["input_ids"][:1], cu_seq_lens_q=borders)


# ---------------------------------------------------------------- mixed layers


@decoders
@pytest.mark.parametrize("mask", ["none", "2d", "additive"])
def test_layers_that_stay_softmax_compute_softmax(
    name: str, mask: str, pretrained: Any, polynomial: Any, batch: Any
) -> None:
    inputs = batch(name)
    real = inputs["attention_mask"].bool() if mask != "none" else torch.ones(inputs["input_ids"].shape).bool()
    if mask == "none":
        del inputs["attention_mask"]
    elif mask == "additive":
        visible = visible_pairs(name, inputs["attention_mask"])
        lowest = torch.finfo(torch.float64).min
        inputs["attention_mask"] = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, lowest)
    original = pretrained(name, BASE[name], attn_implementation="eager").double()
    config = hp.PolyAttentionConfig("poly3", layers=[1], interval=True, clamp=True)
    model = polynomial(pretrained(name, BASE[name]), config).double()
    with torch.no_grad():
        softmax = original(**inputs, output_attentions=True)
        mixed = model(**inputs, output_attentions=True)
        plain = model(**inputs)
    assert same(name, mixed.attentions[0], softmax.attentions[0])
    sums = [weights.sum(-1).transpose(1, 2)[real] for weights in mixed.attentions]
    assert all(((total - 1).abs().max() < 1e-5) == (index != 1) for index, total in enumerate(sums))
    # Eager softmax rounds to float32, SDPA does not.
    assert (mixed.logits - plain.logits)[real].abs().max() < 1e-4 * plain.logits.abs().max()
    assert not same(name, plain.logits, softmax.logits)


def softcapped() -> tuple[Any, Any]:
    config = Gemma2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, vocab_size=96, attn_logit_softcapping=0.5, initializer_range=0.4,
    )  # fmt: skip
    return Gemma2Model(config), lambda attention: setattr(attention, "attn_logit_softcapping", None)


def with_sinks() -> tuple[Any, Any]:
    config = GptOssConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, vocab_size=96, num_local_experts=2, num_experts_per_tok=1, initializer_range=0.4,
    )  # fmt: skip
    return GptOssModel(config), lambda attention: attention.sinks.data.fill_(-100.0)


@pytest.mark.parametrize("build", [softcapped, with_sinks], ids=["gemma2-softcap", "gpt-oss-sinks"])
def test_softmax_layers_keep_soft_caps_and_sinks(build: Any) -> None:
    torch.manual_seed(0)
    model, switch_off = build()
    model.eval().set_attn_implementation("eager")
    inputs = {"input_ids": torch.randint(3, 96, (2, 7)), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}
    expected = output(model, **inputs)
    model.set_attn_implementation("polyattn")  # and no polynomial module: every layer stays softmax
    torch.testing.assert_close(output(model, **inputs), expected, rtol=1e-4, atol=1e-4)
    for layer in model.layers:
        switch_off(layer.self_attn)
    assert (output(model, **inputs) - expected).abs().max() > 1e-2


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
    assert sum("polyattn.coefficients" in key for key in actual) == len(patched_layers(model))
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
        assert torch.equal(value, start[key]) is key.endswith("polyattn.radius"), key

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
