"""Patching changes attention and nothing else, and unpatching leaves no trace."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomModel,
    FalconConfig,
    FalconModel,
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJModel,
    MPNetConfig,
    MPNetModel,
)

import hf_polyattn as hp
from hf_polyattn.patching.attention import polyattn_forward
from hf_polyattn.patching.core import PolyAttention
from hf_polyattn.patching.patch import patched_layers, reconfigure

HEADS = [
    ("minilm", "AutoModel"),
    ("minilm", "AutoModelForMaskedLM"),
    ("minilm", "AutoModelForSequenceClassification"),
    ("gpt2-tinystories", "AutoModelForCausalLM"),
    ("gpt2-tinystories", "AutoModelForTokenClassification"),
    ("gpt2-zinc", "AutoModel"),
    ("llama", "AutoModel"),
    ("llama", "AutoModelForCausalLM"),
    ("llama", "AutoModelForTokenClassification"),
    ("vit", "AutoModel"),
    ("vit", "AutoModelForImageClassification"),
]
heads = pytest.mark.parametrize(("name", "head"), HEADS, ids=[f"{n}-{h.removeprefix('Auto')}" for n, h in HEADS])


@torch.no_grad()
def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)[0]


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Everything of a model that a patch could leave a trace in, weights excepted."""
    modules = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]
    return modules, list(model.state_dict()), model.config.to_json_string(), sorted(vars(model.config))


# ---------------------------------------------------------------- patch and unpatch


@heads
def test_unpatch_restores_the_model_to_the_bit(name: str, head: str, pretrained: Any, batch: Any) -> None:
    model, inputs = pretrained(name, head), batch(name)
    weights, before, softmax = copy.deepcopy(model.state_dict()), fingerprint(model), output(model, inputs)

    assert hp.patch_model(model, "poly3") is model
    assert hp.is_patched(model)
    polynomial = output(model, inputs)
    assert (polynomial - softmax).abs().max() > 1e-2 * softmax.abs().max()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())

    assert hp.unpatch_model(model) is model
    assert not hp.is_patched(model)
    assert torch.equal(output(model, inputs), softmax)
    assert fingerprint(model) == before
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


@heads
def test_softmax_attention_runs_the_original_to_the_bit(name: str, head: str, pretrained: Any, batch: Any) -> None:
    model, inputs = pretrained(name, head), batch(name)
    softmax = output(model, inputs)
    hp.patch_model(model, "poly3")
    polynomial = output(model, inputs)
    with hp.softmax_attention(model):
        assert torch.equal(output(model, inputs), softmax)
    assert torch.equal(output(model, inputs), polynomial)
    assert not torch.equal(polynomial, softmax)


def test_softmax_attention_ends_with_an_exception(pretrained: Any, batch: Any) -> None:
    model, inputs = hp.patch_model(pretrained("gpt2-zinc"), "poly3"), batch("gpt2-zinc")
    polynomial = output(model, inputs)
    inside: list[Tensor] = []

    def interrupted() -> None:
        with hp.softmax_attention(model):
            inside.append(output(model, inputs))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert not torch.equal(inside[0], polynomial)
    assert torch.equal(output(model, inputs), polynomial)


def test_softmax_attention_nests(pretrained: Any, batch: Any) -> None:
    model, inputs = pretrained("gpt2-zinc"), batch("gpt2-zinc")
    softmax = output(model, inputs)
    hp.patch_model(model, "poly3")
    with hp.softmax_attention(model):
        with hp.softmax_attention(model):
            pass
        assert torch.equal(output(model, inputs), softmax)
    assert not torch.equal(output(model, inputs), softmax)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_unpatch_returns_to_the_implementation_that_was_chosen(
    implementation: str, pretrained: Any, batch: Any
) -> None:
    model = pretrained("llama", "AutoModelForCausalLM", attn_implementation=implementation)
    softmax = output(model, batch("llama"))
    hp.unpatch_model(hp.patch_model(model, "poly3"))
    assert model.config._attn_implementation == implementation
    assert torch.equal(output(model, batch("llama")), softmax)


@pytest.mark.parametrize("action", [hp.unpatch_model, lambda model: hp.softmax_attention(model).__enter__()])
def test_a_softmax_model_cannot_be_unpatched(action: Any, pretrained: Any) -> None:
    with pytest.raises(hp.PatchError, match=r"GPT2Model is not patched; call patch_model"):
        action(pretrained("gpt2-zinc"))


def test_the_same_config_again_changes_nothing(pretrained: Any, polynomial: Any) -> None:
    model = polynomial(pretrained("gpt2-zinc"), "poly3")
    children = [layer for _, layer in patched_layers(model)]
    trained = [layer.coefficients.clone() for layer in children]
    assert hp.patch_model(model, "poly3") is model
    assert [layer for _, layer in patched_layers(model)] == children
    assert all(torch.equal(layer.coefficients, before) for layer, before in zip(children, trained, strict=True))


def test_the_spec_of_a_calibrated_model_is_the_same_config(pretrained: Any) -> None:
    model = hp.patch_model(pretrained("gpt2-zinc"), "poly3")
    reconfigure(model, interval=True, clamp=True, key_shift=True)  # as calibration does
    assert hp.patch_model(model, "poly3") is model
    assert all(layer.config.interval for _, layer in patched_layers(model))
    assert model.config.polyattn_config["interval"] is True
    with pytest.raises(hp.PatchError, match="already patched"):
        hp.patch_model(model, "poly3-l1")


@pytest.mark.parametrize("other", ["poly4", "poly3-l1", hp.PolyAttentionConfig("poly3", learnable=False)], ids=str)
def test_another_config_on_a_patched_model_raises(other: Any, pretrained: Any) -> None:
    model = hp.patch_model(pretrained("gpt2-zinc"), "poly3")
    with pytest.raises(hp.PatchError, match="already patched"):
        hp.patch_model(model, other)
    assert {str(layer.config) for _, layer in patched_layers(model)} == {"poly3"}


# ---------------------------------------------------------------- which modules


def layers_of(model: Any) -> list[int]:
    return [int(next(part for part in path.split(".") if part.isdigit())) for path, _ in patched_layers(model)]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"layers": [1, 3]}, [1, 3]),
        ({"include": ["*.h.0.*", "*.h.2.*"]}, [0, 2]),
        ({"exclude": "*.h.1.attn"}, [0, 2, 3]),
        ({"layers": range(1, 4), "exclude": ["*.h.2.*"]}, [1, 3]),
    ],
    ids=["all", "layers", "include", "exclude", "layers-and-exclude"],
)
def test_choice_of_layers(choice: Any, expected: list[int], pretrained: Any, batch: Any) -> None:
    model = pretrained("gpt2-zinc", "AutoModelForCausalLM")
    before, inputs = fingerprint(model), batch("gpt2-zinc")
    softmax = output(model, inputs)
    hp.patch_model(model, "poly3", **choice)
    assert layers_of(model) == expected
    statuses = [row[-1] for row in hp.describe(model).rows]
    assert [index for index, status in enumerate(statuses) if status == "patched"] == expected
    assert not torch.equal(output(model, inputs), softmax)
    hp.unpatch_model(model)
    assert fingerprint(model) == before


def test_choices_in_the_config_and_in_the_call_are_the_same(pretrained: Any) -> None:
    model = hp.patch_model(pretrained("gpt2-zinc"), hp.PolyAttentionConfig("poly3", layers=[2]))
    assert layers_of(model) == [2]
    assert hp.patch_model(model, "poly3", layers=[2]) is model


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"layers": [2, 4]}, r"no attention in layers \[4\]; it has layers \[0, 1, 2, 3\]"),
        ({"layers": []}, "no module that can be patched: .*layer not asked for"),
        ({"include": ["nowhere"]}, "no module that can be patched: .*excluded"),
    ],
    ids=["out-of-range", "no-layer", "no-path"],
)
def test_a_choice_of_nothing_raises(choice: Any, message: str, pretrained: Any) -> None:
    model = pretrained("gpt2-zinc")
    before = fingerprint(model)
    with pytest.raises(hp.PatchError, match=message):
        hp.patch_model(model, "poly3", **choice)
    assert fingerprint(model) == before


def decoder_with_cross_attention(family: str) -> Any:
    sizes: dict[str, Any] = {"add_cross_attention": True, "initializer_range": 0.4, "vocab_size": 64}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **sizes)).eval()
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, is_decoder=True, **sizes
    )
    return BertLMHeadModel(config).eval()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_cross_attention_stays_softmax_unless_asked_for(family: str) -> None:
    torch.manual_seed(0)
    model, encoded = decoder_with_cross_attention(family), torch.randn(2, 7, 32)
    padding = torch.ones(2, 7, dtype=torch.long)
    padding[1, 4:] = 0
    inputs = {
        "input_ids": torch.randint(0, 64, (2, 5)),
        "encoder_hidden_states": encoded,
        "encoder_attention_mask": padding,
    }
    softmax = output(model, inputs)
    selfish = output(hp.patch_model(model, "poly3"), inputs)
    assert len(patched_layers(model)) == 2
    hp.unpatch_model(model)
    assert torch.equal(output(model, inputs), softmax)

    both = output(hp.patch_model(model, "poly3", cross_attention=True), inputs)
    assert len(patched_layers(model)) == 4
    assert not torch.equal(both, selfish)
    # What encoder_attention_mask hides has no influence, what it shows has.
    other = encoded.clone()
    other[1, 4:] += 1.0
    assert torch.equal(output(model, {**inputs, "encoder_hidden_states": other}), both)
    other[1, 3] += 1.0
    assert not torch.equal(output(model, {**inputs, "encoder_hidden_states": other}), both)


def test_dry_run_prints_the_plan_and_changes_nothing(pretrained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = pretrained("gpt2-zinc", "AutoModelForCausalLM")
    before = fingerprint(model)
    assert hp.patch_model(model, "poly3", layers=[0], dry_run=True) is model
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["module", "class", "layer", "heads", "head", "dim", "spec", "status"]
    assert lines[2].split()[:2] == ["transformer.h.0.attn", "GPT2Attention"]
    assert lines[2].endswith("can be patched")
    assert lines[3].endswith("layer not asked for")
    assert fingerprint(model) == before


def test_describe_lists_every_attention_module(pretrained: Any) -> None:
    model = pretrained("llama", "AutoModelForCausalLM")
    assert {row[-1] for row in hp.describe(model).rows} == {"can be patched"}
    hp.patch_model(model, "poly3^16-l1", layers=[0])
    table = hp.describe(model)
    assert table.rows[0] == ("model.layers.0.self_attn", "LlamaAttention", 0, 8, 8, "poly3^16-l1", "patched")
    assert table.rows[1][-2:] == ("softmax", "layer not asked for")
    with hp.softmax_attention(model):
        assert hp.describe(model).rows[0][-1] == "patched, but running sdpa"
    widths = [len(line.rstrip()) for line in str(table).splitlines()]
    assert len(widths) == 2 + 5
    assert str(table).splitlines()[1].startswith("---")


# ---------------------------------------------------------------- refusals

HARD_CODED = {
    "BloomAttention": lambda: BloomModel(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)),
    "MPNetSelfAttention": lambda: MPNetModel(
        MPNetConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64)
    ),
    "GPTJAttention": lambda: GPTJModel(GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=64)),
    "FalconAttention": lambda: FalconModel(
        FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    ),
}


@pytest.mark.parametrize("class_name", HARD_CODED)
def test_attention_that_would_stay_softmax_is_refused(class_name: str) -> None:
    model = HARD_CODED[class_name]().eval()
    before, inputs = fingerprint(model), {"input_ids": torch.randint(2, 64, (1, 6))}
    softmax = output(model, inputs)
    with pytest.raises(hp.PatchError, match=f"silently stay softmax: .*{class_name}"):
        hp.patch_model(model, "poly3")
    assert fingerprint(model) == before
    assert torch.equal(output(model, inputs), softmax)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))], ids=["Linear", "Sequential"])
def test_a_module_of_torch_is_refused(module: nn.Module) -> None:
    with pytest.raises(hp.PatchError, match=f"PreTrainedModel .*got {type(module).__name__}"):
        hp.patch_model(module, "poly3")


@pytest.mark.parametrize(
    ("config", "error"),
    [("softmax", hp.SpecError), ("poly9", hp.SpecError), (hp.PolyAttentionConfig(backend="cuda"), hp.BackendError)],
    ids=["grammar", "degree", "backend"],
)
def test_a_wrong_config_leaves_the_model_as_it_was(config: Any, error: type[Exception], pretrained: Any) -> None:
    model = pretrained("gpt2-zinc")
    before = fingerprint(model)
    with pytest.raises(error):
        hp.patch_model(model, config)
    assert fingerprint(model) == before


def test_a_patch_that_fails_midway_leaves_nothing_half_patched(
    pretrained: Any, batch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = pretrained("gpt2-zinc"), batch("gpt2-zinc")
    before, softmax = fingerprint(model), output(model, inputs)
    created: list[PolyAttention] = []
    initialize = PolyAttention.__init__

    def out_of_memory(self: PolyAttention, *args: Any, **kwargs: Any) -> None:
        if len(created) == 2:
            raise MemoryError("third layer")
        initialize(self, *args, **kwargs)
        created.append(self)

    monkeypatch.setattr(PolyAttention, "__init__", out_of_memory)
    with pytest.raises(MemoryError):
        hp.patch_model(model, "poly3")
    assert len(created) == 2
    assert fingerprint(model) == before
    assert torch.equal(output(model, inputs), softmax)


UNSUPPORTED = ["softcap", "position_bias", "s_aux", "sinks", "cache", "attn_bias"]


@pytest.mark.parametrize("argument", UNSUPPORTED)
def test_unsupported_arguments_raise_by_name(argument: str, pretrained: Any) -> None:
    model = hp.patch_model(pretrained("llama"), "poly3")
    module = model.layers[0].self_attn
    query, key, value = torch.randn(1, 8, 3, 8), torch.randn(1, 4, 3, 8), torch.randn(1, 4, 3, 8)
    polyattn_forward(module, query, key, value, None, **{argument: None})
    with pytest.raises(hp.UnsupportedArgumentError, match=f"LlamaAttention passes '{argument}'"):
        polyattn_forward(module, query, key, value, None, **{argument: torch.ones(1)})


def test_softcap_of_gemma2_raises_and_its_excluded_layers_run() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64, vocab_size=64, attn_logit_softcapping=50.0, initializer_range=0.4,
    )  # fmt: skip
    model, inputs = Gemma2Model(config).eval(), {"input_ids": torch.randint(0, 64, (1, 6))}
    hp.patch_model(model, "poly3")
    with pytest.raises(hp.UnsupportedArgumentError, match="Gemma2Attention passes 'softcap'"):
        output(model, inputs)
    config.attn_logit_softcapping = None
    hp.patch_model(Gemma2Model(config), "poly3")(**inputs)


@pytest.mark.parametrize("value", ["-1e4", "min", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_additive_masks_hide_where_they_are_large_and_negative(value: str, dtype: torch.dtype, pretrained: Any) -> None:
    module = hp.patch_model(pretrained("llama"), "poly3").layers[0].self_attn
    query, key = torch.randn(1, 8, 3, 8).to(dtype), torch.randn(1, 4, 3, 8).to(dtype)
    visible = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    hidden = torch.finfo(dtype).min if value == "min" else float(value)
    additive = torch.zeros(1, 1, 3, 3, dtype=dtype).masked_fill(~visible, hidden)
    expected, _ = polyattn_forward(module, query, key, key, visible)
    actual, _ = polyattn_forward(module, query, key, key, additive)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, polyattn_forward(module, query, key, key, None, is_causal=False)[0])


@pytest.mark.parametrize(
    ("mask", "message"),
    [(torch.full((1, 1, 3, 3), -1.5), "position bias"), (torch.ones(1, 1, 3, 3, dtype=torch.long), "int64")],
    ids=["bias", "integer"],
)
def test_masks_that_are_no_masks_raise(mask: Tensor, message: str, pretrained: Any) -> None:
    module = hp.patch_model(pretrained("llama"), "poly3").layers[0].self_attn
    query, key = torch.randn(1, 8, 3, 8), torch.randn(1, 4, 3, 8)
    with pytest.raises(hp.InputError, match=message):
        polyattn_forward(module, query, key, key, mask)


# ---------------------------------------------------------------- wrappers


def lora(model: Any, **kwargs: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **kwargs))


@pytest.mark.parametrize("order", ["patch-first", "peft-first"])
def test_patching_works_through_peft(order: str, pretrained: Any, batch: Any) -> None:
    inputs = batch("llama")
    plain = pretrained("llama", "AutoModelForCausalLM")
    softmax = output(plain, inputs)
    expected = output(hp.patch_model(plain, "poly3"), inputs)

    model = pretrained("llama", "AutoModelForCausalLM")
    wrapped = lora(hp.patch_model(model, "poly3")) if order == "patch-first" else hp.patch_model(lora(model), "poly3")
    assert hp.is_patched(wrapped)
    assert len(hp.describe(wrapped).rows) == 5
    assert torch.equal(output(wrapped, inputs), expected)
    with hp.softmax_attention(wrapped):
        assert torch.equal(output(wrapped, inputs), softmax)
    assert hp.unpatch_model(wrapped) is wrapped
    assert torch.equal(output(wrapped, inputs), softmax)
    assert not torch.equal(expected, softmax)


def train_step(model: Any, inputs: dict[str, Tensor], rate: float) -> None:
    """One step of gradient descent with steps of one length for every tensor."""
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad / (parameter.grad.norm() + 1e-30)
                parameter.grad = None
    model.eval()


def test_peft_trains_saves_and_merges_coefficients(pretrained: Any, polynomial: Any, batch: Any, tmp_path: Any) -> None:
    from peft import PeftModel

    inputs = batch("llama")
    base = polynomial(pretrained("llama", "AutoModelForCausalLM"))
    before = [layer.coefficients.clone() for _, layer in patched_layers(base)]
    model = lora(copy.deepcopy(base), modules_to_save=["polyattn"])
    start = output(model, inputs)
    assert torch.equal(start, output(base, inputs))
    train_step(model, inputs, 0.05)
    trained = output(model, inputs)
    assert not torch.equal(trained, start)
    for (_, layer), old in zip(patched_layers(model), before, strict=True):
        assert not torch.equal(layer.coefficients, old)

    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(output(reloaded, inputs), trained)

    merged = reloaded.merge_and_unload()
    layers = patched_layers(merged)
    assert [type(merged.get_submodule(path).polyattn) for path, _ in layers] == [PolyAttention] * 5
    for (_, layer), (_, expected) in zip(layers, patched_layers(model), strict=True):
        assert torch.equal(layer.coefficients, expected.coefficients)
    # Merging adds the LoRA product to the weights: the same numbers in another order of float32 sums.
    torch.testing.assert_close(output(merged, inputs), trained, rtol=1e-3, atol=1e-3)


def test_peft_refuses_trained_polynomials_on_a_softmax_model(pretrained: Any, tmp_path: Any) -> None:
    from peft import PeftModel

    model = hp.patch_model(pretrained("llama", "AutoModelForCausalLM"), "poly3")
    lora(model, modules_to_save=["polyattn"]).save_pretrained(tmp_path)
    with pytest.raises(hp.PatchError, match=r"trained polynomial attention at .*layers.0.self_attn.*patch_model"):
        PeftModel.from_pretrained(pretrained("llama", "AutoModelForCausalLM"), tmp_path)
    patched = hp.patch_model(pretrained("llama", "AutoModelForCausalLM"), "poly3")
    assert hp.is_patched(PeftModel.from_pretrained(patched, tmp_path))


def test_peft_without_modules_to_save_freezes_the_polynomials(pretrained: Any, polynomial: Any, batch: Any) -> None:
    model = lora(polynomial(pretrained("llama", "AutoModelForCausalLM")))
    before = [layer.coefficients.clone() for _, layer in patched_layers(model)]
    start = output(model, batch("llama"))
    train_step(model, batch("llama"), 0.05)
    assert not torch.equal(output(model, batch("llama")), start)
    assert all(
        torch.equal(layer.coefficients, old) for (_, layer), old in zip(patched_layers(model), before, strict=True)
    )


class Replica(nn.Module):
    """Holds a model as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Tensor) -> Any:
        return self.module(**inputs)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [compiled, Replica, lambda model: Replica(compiled(model))],
    ids=["compiled", "replica", "replica-of-compiled"],
)
def test_patching_works_through_wrappers(wrap: Any, pretrained: Any, batch: Any) -> None:
    inputs, model = batch("gpt2-zinc"), pretrained("gpt2-zinc", n_layer=1)
    softmax = output(model, inputs)
    wrapped = wrap(model)
    assert hp.patch_model(wrapped, "poly3") is wrapped
    assert hp.is_patched(wrapped)
    assert hp.is_patched(model)
    polynomial = output(wrapped, inputs)
    assert not torch.equal(polynomial, softmax)
    with hp.softmax_attention(wrapped):
        assert torch.equal(output(wrapped, inputs), softmax)
    assert torch.equal(output(wrapped, inputs), polynomial)
    hp.unpatch_model(wrapped)
    assert torch.equal(output(wrapped, inputs), softmax)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", ["minilm", "gpt2-zinc", "llama", "vit"])
def test_copies_are_equal_and_independent(clone: Any, name: str, pretrained: Any, polynomial: Any, batch: Any) -> None:
    model, inputs = pretrained(name), batch(name)
    softmax = output(model, inputs)
    expected = output(polynomial(model), inputs)
    other = clone(model)
    assert torch.equal(output(other, inputs), expected)
    with torch.no_grad():
        patched_layers(other)[0][1].coefficients.add_(1.0)
    assert not torch.equal(output(other, inputs), expected)
    hp.unpatch_model(other)
    assert torch.equal(output(other, inputs), softmax)
    assert torch.equal(output(model, inputs), expected)


# ---------------------------------------------------------------- polynomials


def test_one_polynomial_a_layer_is_the_same_polynomial_for_its_heads(pretrained: Any, batch: Any) -> None:
    inputs = batch("minilm")
    shared = hp.patch_model(pretrained("minilm"), hp.PolyAttentionConfig("taylor3-l1", granularity="layer"))
    assert {layer.coefficients.shape for _, layer in patched_layers(shared)} == {(1, 4)}
    heads = hp.patch_model(pretrained("minilm"), "taylor3-l1")
    assert {layer.coefficients.shape for _, layer in patched_layers(heads)} == {(12, 4)}
    assert torch.equal(output(shared, inputs), output(heads, inputs))
    with torch.no_grad():
        patched_layers(heads)[0][1].coefficients[3] += 1.0
    assert not torch.equal(output(shared, inputs), output(heads, inputs))


@pytest.mark.parametrize("learnable", [True, False], ids=["learnable", "frozen"])
def test_frozen_polynomials_get_no_gradients(learnable: bool, pretrained: Any, polynomial: Any, batch: Any) -> None:
    config = hp.PolyAttentionConfig("poly3", learnable=learnable, interval=True, clamp=True, key_shift=True)
    model, inputs = polynomial(pretrained("gpt2-zinc", "AutoModelForCausalLM"), config), batch("gpt2-zinc")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.transformer.wte.weight.grad.norm() > 0
    for _, layer in patched_layers(model):
        for name, parameter in layer.named_parameters():
            assert parameter.requires_grad is learnable, name
            assert (parameter.grad is not None and bool(parameter.grad.any())) is learnable, name


def test_only_what_the_config_uses_is_trainable(pretrained: Any) -> None:
    model = hp.patch_model(pretrained("gpt2-zinc"), "poly3")
    _, layer = patched_layers(model)[0]
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["coefficients"]


CASTS = {
    "to-bfloat16": lambda model: model.to(torch.bfloat16),
    "to-cpu-float16": lambda model: model.to("cpu", torch.float16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_polynomials_stay_float32_when_the_model_is_cast(
    cast: str, pretrained: Any, polynomial: Any, batch: Any
) -> None:
    model = polynomial(pretrained("llama", "AutoModelForCausalLM"))
    before = copy.deepcopy({key: value for key, value in model.state_dict().items() if "polyattn" in key})
    expected = output(model, batch("llama"))
    model = CASTS[cast](model)
    assert model.dtype in (torch.bfloat16, torch.float16)
    after = {key: value for key, value in model.state_dict().items() if "polyattn" in key}
    assert all(torch.equal(after[key], value) and after[key].dtype == torch.float32 for key, value in before.items())
    assert len(before) == 4 * 5
    actual = output(model, batch("llama"))
    assert actual.dtype == model.dtype
    assert not torch.equal(actual.float(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_polynomials_stay_float32_when_a_checkpoint_is_loaded_in_low_precision(
    dtype: torch.dtype, pretrained: Any, polynomial: Any, tmp_path: Any
) -> None:
    model = polynomial(pretrained("gpt2-zinc", "AutoModelForCausalLM"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert "polyattn" in loaded._keep_in_fp32_modules_strict  # what quantized loading reads
    expected = {key: value for key, value in model.state_dict().items() if "polyattn" in key}
    for key, value in loaded.state_dict().items():
        assert value.dtype == (torch.float32 if "polyattn" in key else dtype), key
        if key in expected:
            assert torch.equal(value, expected[key])
    # Saved from low precision, they are still exact.
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert again.dtype == dtype
    for (_, layer), (_, original) in zip(patched_layers(again), patched_layers(model), strict=True):
        assert torch.equal(layer.coefficients, original.coefficients)
        assert layer.radius.dtype == torch.float32
        assert torch.equal(layer.radius, original.radius)


def test_changed_heads_raise(pretrained: Any) -> None:
    module = hp.patch_model(pretrained("llama"), "poly3").layers[0].self_attn
    key = torch.randn(1, 4, 3, 8)
    with pytest.raises(hp.PatchError, match="patched for 8 query heads and now gets 4"):
        polyattn_forward(module, torch.randn(1, 4, 3, 8), key, key, None)
