"""The norms that a monitor logs: those of the weights that a model's own attention gives, softmax's too."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MarianConfig, MarianMTModel

from hf_polyattn import Monitor, MonitorCallback, PatchError, calibrate, patch_model

Batch = dict[str, Tensor]


@pytest.fixture
def inputs(batch: Callable[..., Batch]) -> Batch:
    """4 texts of 8 tokens: a monitor looks at all rows of so few."""
    ids = batch("llama", count=4, length=24)["input_ids"][:, 8:16]
    return {"input_ids": ids, "labels": ids}


def frobenius(weights: Tensor) -> float:
    """‖A‖_F/√N of (B, H, N, N), of the largest head, over all sequences."""
    return float(weights.double().square().sum(-1).mean((0, 2)).sqrt().amax())


@pytest.mark.parametrize("spec", [None, "poly3", "poly4-l1"])
def test_norms_are_those_of_the_attention_weights(
    pretrained: Callable[..., Any], inputs: Batch, spec: str | None
) -> None:
    model = pretrained("llama", "AutoModelForCausalLM").train()
    if spec is not None:
        patch_model(model, spec)
    if spec == "poly4-l1":
        calibrate(model, [inputs], progress=False)
    with Monitor(model, norms=True) as monitor:
        model(**inputs)
        scalars = monitor.scalars()
    if spec is None:
        model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    logged = [scalars[f"polyattn/attention_norm/model.layers.{i}.self_attn"] for i in range(5)]
    assert logged == pytest.approx([frobenius(weights) for weights in attentions], rel=1e-4)
    assert len({round(norm, 4) for norm in logged}) == 5
    if spec is None:
        assert max(logged) <= 1.0  # Theorem 4.1
        jacobians = [scalars[f"polyattn/jacobian_norm/model.layers.{i}.self_attn"] for i in range(5)]
        assert jacobians == pytest.approx([jacobian(weights) for weights in attentions], rel=1e-3)
        assert 0.0 < max(jacobians) <= 2.0


def jacobian(weights: Tensor) -> float:
    """‖∇softmax‖_F/√N from its definition, diag(p) − p pᵀ for each row."""
    p = weights.double()
    blocks = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    return float(blocks.square().sum((-2, -1)).mean((0, 2)).sqrt().amax())


def test_watching_changes_no_bit_and_ends(pretrained: Callable[..., Any], inputs: Batch) -> None:
    model = pretrained("llama", "AutoModelForCausalLM").train()
    before = model(**inputs).logits
    monitor = Monitor(model, norms=True, every=2)
    assert torch.equal(model(**inputs).logits, before)
    first = monitor.scalars()
    monitor.check()
    with torch.no_grad():
        model(**{**inputs, "input_ids": inputs["input_ids"].flip(0, 1)})  # evaluation is not watched
    monitor.steps = 2
    model(**{**inputs, "input_ids": inputs["input_ids"].flip(1)})  # nor is a step between two records
    assert monitor.scalars() == first
    monitor.step()
    model(**{**inputs, "input_ids": inputs["input_ids"].flip(1)})
    assert monitor.scalars() != first
    monitor.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_copies_of_a_watched_softmax_model_are_not_watched(pretrained: Callable[..., Any], inputs: Batch) -> None:
    model = pretrained("llama", "AutoModelForCausalLM").train()
    with Monitor(model, norms=True) as monitor:
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(**inputs)
        assert monitor.scalars() == {}
        with pytest.raises(IndexError):  # a pass that fails leaves nobody watching
            model(input_ids=torch.full((1, 4), 10**6))
        model(**inputs)
        assert len(monitor.scalars()) == 10


def test_softmax_and_polynomial_layers_of_one_model_are_both_seen(
    pretrained: Callable[..., Any], inputs: Batch
) -> None:
    model = patch_model(pretrained("llama", "AutoModelForCausalLM"), "poly3", layers=[1, 3]).train()
    with Monitor(model, norms=True) as monitor:
        model(**inputs)
        norms = [name for name in monitor.scalars() if "/attention_norm/" in name]
    assert sorted(norms) == [f"polyattn/attention_norm/model.layers.{i}.self_attn" for i in range(5)]


def test_cross_attention_and_padding_are_seen() -> None:
    config = MarianConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, decoder_start_token_id=0,
        eos_token_id=1, forced_eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MarianMTModel(config).train()
    ids = torch.arange(2, 14).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    norms = []
    for attention_mask in (mask, torch.ones_like(mask)):
        with Monitor(model, norms=True) as monitor:
            model(input_ids=ids, attention_mask=attention_mask, labels=ids)
            norms.append(monitor.scalars())
    cross = "polyattn/attention_norm/model.decoder.layers.0.encoder_attn"
    # Untrained softmax is nearly uniform: over 6 keys its norm is 6^(-1/2), over 6 and 3 the root of their mean square.
    assert norms[1][cross] == pytest.approx(6**-0.5, rel=0.01)
    assert norms[0][cross] == pytest.approx(((1 / 6 + 1 / 3) / 2) ** 0.5, rel=0.01)
    assert len(norms[0]) == 2 * 3


def test_attention_that_cannot_be_watched_is_named(pretrained: Callable[..., Any]) -> None:
    model = pretrained("llama", "AutoModelForCausalLM")
    with pytest.raises(PatchError, match="norms=True"):
        Monitor(model)
    model.set_attn_implementation("eager")
    with pytest.raises(PatchError, match=r"'model\.layers\.0\.self_attn' cannot be watched.*eager"):
        Monitor(model, norms=True)
    with pytest.raises(PatchError, match="no attention whose norms"):
        Monitor(torch.nn.Sequential(MarianMTModel(MarianConfig(
            vocab_size=8, d_model=4, encoder_layers=0, decoder_layers=0, pad_token_id=0))), norms=True)  # fmt: skip


def test_callback_logs_the_norms_of_softmax(pretrained: Callable[..., Any], inputs: Batch, tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    model = pretrained("llama", "AutoModelForCausalLM")
    monitor = Monitor(model, norms=True, every=1)
    rows = [{name: tensor[i] for name, tensor in inputs.items()} for i in range(4)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, logging_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[MonitorCallback(monitor)])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert all(0.0 < entry[f"polyattn/attention_norm/model.layers.{i}.self_attn"] <= 1.0
               for entry in logged for i in range(5))  # fmt: skip
    assert all(entry["grad_norm"] > 0.0 for entry in logged)
