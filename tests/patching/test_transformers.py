"""A patched model computes the formula: padding, masks, caches and generation, in layers that are mixed too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from in_double import (
    BASE,
    Recorder,
    all_four,
    as_double,
    decoders,
    output,
    positions,
    same,
    textbook_weights,
    visible_pairs,
)
from torch import Tensor
from transformers import (
    DataCollatorWithFlattening,
    DynamicCache,
    Gemma2Config,
    Gemma2Model,
    GptOssConfig,
    GptOssModel,
    MistralConfig,
    MistralForCausalLM,
)

import hf_polyattn as hp

# ---------------------------------------------------------------- the formula


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
