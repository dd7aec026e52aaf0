"""What cannot be patched is refused, and left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomModel,
    FalconConfig,
    FalconModel,
    Gemma2Config,
    Gemma2Model,
    MPNetConfig,
    MPNetModel,
)
from with_heads import fingerprint, output

import hf_polyattn as hp
from hf_polyattn.patching.attention import polyattn_forward
from hf_polyattn.patching.core import PolyAttention

# ---------------------------------------------------------------- refusals

HARD_CODED = {
    "BloomAttention": lambda: BloomModel(BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)),
    "MPNetSelfAttention": lambda: MPNetModel(
        MPNetConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64)
    ),
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
