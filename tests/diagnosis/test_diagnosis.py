"""Diagnosis, on real checkpoints: its norms are those of the operator, softmax's keep the paper's bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

import hf_polyattn.diagnosis.diagnosis
from hf_polyattn import (
    Diagnosis,
    InputError,
    PatchError,
    PolyAttentionConfig,
    calibrate,
    diagnose,
    patch_model,
    polynomial_attention,
)
from hf_polyattn.adaptation.capture import observe
from hf_polyattn.diagnosis.inspection import interval_scores, polynomial_squares, softmax_squares, weights_and_slopes
from hf_polyattn.patching.core import PolyAttention

Batch = dict[str, Tensor]


@pytest.fixture
def zinc(pretrained: Callable[..., Any]) -> Any:
    return pretrained("gpt2-zinc", "AutoModelForCausalLM")


def with_positions(batch: Batch) -> Batch:
    """Returns a GPT-2 batch whose tokens have the positions that they have without padding."""
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def by_head(diagnosis: Diagnosis, name: str) -> Tensor:
    """Returns an attribute as (layers, heads)."""
    return torch.tensor([getattr(layer, name) for layer in diagnosis.layers], dtype=torch.float64)


def of_root_n(diagnosis: Diagnosis, name: str) -> Tensor:
    return by_head(diagnosis, name) / torch.tensor([[layer.bound] for layer in diagnosis.layers], dtype=torch.float64)


# ---------------------------------------------------------------- closed forms


def row_norms(function: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    """Returns ‖J‖² of each row (B, H, rows), summed from the whole Jacobian of scores -> weights."""
    whole = jacobian(function, scores)  # type: ignore[no-untyped-call]
    return whole.square().flatten(4).sum((-1, -2))


SPECS = ["poly3", "poly3-mean", "poly3-none", "poly4-l1", "taylor2-l1", "poly2^4", "poly3^2-mean", "poly3^8-l1"]


@pytest.mark.parametrize("calibrated", [False, True], ids=["bare", "interval-clamp-shift"])
@pytest.mark.parametrize("spec", SPECS)
def test_closed_forms_are_the_norms_of_the_operators_weights_and_jacobian(spec: str, calibrated: bool) -> None:
    """Keys and values that are unit vectors make queries the scores and outputs the weights."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    config = PolyAttentionConfig(spec, interval=calibrated, clamp=calibrated, key_shift=calibrated)
    layer = PolyAttention(config, heads=2, head_dim=5).double()
    with torch.no_grad():
        for polynomial in (layer.coefficients, layer.delta, layer.directions):
            polynomial.add_(0.3 * noise(*polynomial.shape))
        layer.center.copy_(0.3 * noise(2))
        layer.radius.copy_(1.0 + 0.3 * noise(2).abs())
        layer.key_shift.copy_(0.2 * noise(2, 5))
    scores, unit = noise(1, 2, 4, 5), torch.eye(5, dtype=torch.float64).expand(1, 2, 5, 5)
    visible = torch.rand(1, 2, 4, 5, generator=generator) < 0.7
    visible[..., 0] = True
    center = layer.shifted_center(scores, 1.0).detach() if calibrated else 0.0

    def weights(x: Tensor) -> Tensor:
        output: Tensor = polynomial_attention(
            x,
            unit,
            unit,
            (layer.coefficients + torch.einsum("hl,hlk->hk", layer.delta, layer.directions)).detach(),
            mask=visible,
            scaling=1.0,
            power=config.spec.power,
            normalizer=config.spec.normalizer,
            center=center,
            radius=layer.radius if calibrated else 1.0,
            clamp=calibrated,
            backend="reference",
        )
        return output.transpose(1, 2)

    with torch.no_grad():
        t = interval_scores(layer, scores, scores, visible, 1.0)
        weight, slope = weights_and_slopes(layer, t, visible)
        squares, steep = polynomial_squares(weight, slope, visible, config.spec.normalizer)
        without_clamp = weights_and_slopes(layer, t.clamp(-1.0, 1.0), visible)[1]
    exact = row_norms(weights, scores)
    torch.testing.assert_close(squares, weights(scores).square().sum(-1))
    torch.testing.assert_close(steep, exact)
    if calibrated:  # the control: scores beyond the clamp are there, and their slopes are not 0 by themselves
        assert not torch.equal(without_clamp, slope)
    if config.spec.normalizer == "l1":  # the control: the rank-one term of the row sum counts
        alone = (slope / weight.abs().sum(-1, keepdim=True)).square().sum(-1)
        assert ((alone - exact).abs() > 1e-3 * exact).any()


def test_closed_form_is_the_norm_of_softmaxs_jacobian() -> None:
    torch.manual_seed(0)
    scores = 2.0 * torch.randn(1, 2, 4, 6, dtype=torch.float64)
    visible = torch.rand(1, 1, 4, 6) < 0.6
    visible[..., 0] = True
    visible[0, 0, -1] = False  # a row that sees nothing

    def softmax(x: Tensor) -> Tensor:
        return x.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)

    squares, steep = softmax_squares(scores, visible)
    torch.testing.assert_close(squares, softmax(scores).square().sum(-1))
    torch.testing.assert_close(steep[:, :, :-1], row_norms(softmax, scores)[:, :, :-1])
    assert not squares[:, :, -1].any()
    assert not steep[:, :, -1].any()


# ---------------------------------------------------------------- real checkpoints


def test_softmax_keeps_the_papers_bounds_and_calibrated_polynomials_follow_it(
    pretrained: Callable[..., Any], batch: Callable[..., Batch]
) -> None:
    batches = [batch("gpt2-zinc", count=3, length=40)]
    found = {}
    for spec, calibrated in (("poly6-l1", True), ("poly3", False)):
        model = patch_model(pretrained("gpt2-zinc", "AutoModelForCausalLM"), spec)
        if calibrated:
            calibrate(model, batches, progress=False)
        found[spec] = diagnose(model, batches, progress=False)
        assert (of_root_n(found[spec], "softmax_norm") <= 1.0).all()
        assert (of_root_n(found[spec], "softmax_jacobian") <= 2.0).all()
    good, bare = found["poly6-l1"], found["poly3"]
    for kind in ("norm", "jacobian"):
        softmax = by_head(good, f"softmax_{kind}")
        assert (softmax > 0.1).all()  # a bound that 0 keeps would show nothing
        torch.testing.assert_close(by_head(good, f"polynomial_{kind}"), softmax, rtol=0.05, atol=0.0)
        assert (by_head(bare, f"polynomial_{kind}").mean(1) > 5.0 * softmax.mean(1)).all()
        torch.testing.assert_close(by_head(bare, f"softmax_{kind}"), softmax)
    assert (of_root_n(bare, "polynomial_norm") > 1.0).any(1).all()
    assert "norms are like softmax's" in str(good)
    assert "differ from softmax's by more than a factor of 2 (every layer)" in str(bare)
    assert bare.layers[0].above is None
    assert "no interval" in str(bare)


def test_norms_are_those_of_the_weights_that_the_model_uses(
    pretrained: Callable[..., Any], batch: Callable[..., Batch]
) -> None:
    inputs, llama = batch("llama", count=1, length=40), pretrained("llama", "AutoModelForCausalLM")
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = llama(**inputs, output_attentions=True).attentions
    calibrate(patch_model(llama, "poly3"), [inputs], progress=False)
    used: list[Tensor] = []

    def keep(path: str, layer: PolyAttention, seen: Any) -> None:
        used.append(layer(seen.query, seen.key, seen.value, return_weights=True, **seen.pattern)[1])

    observe(llama, [inputs], keep, progress=False)
    found = diagnose(llama, [inputs], progress=False)
    for name, matrices in (("softmax_norm", attentions), ("polynomial_norm", used)):
        expected = torch.stack([matrix[0].double().square().sum((-1, -2)).sqrt() for matrix in matrices])
        torch.testing.assert_close(by_head(found, name), expected, rtol=1e-4, atol=0.0)
    assert (by_head(found, "softmax_norm") - by_head(found, "polynomial_norm")).abs().max() > 0.01


def test_left_padding_does_not_count(zinc: Any, batch: Callable[..., Batch]) -> None:
    padded = with_positions(batch("gpt2-zinc", count=3, length=30, side="left"))
    alone = []
    for i, mask in enumerate(padded["attention_mask"].bool()):
        alone.append({name: value[i : i + 1, mask] for name, value in padded.items()})
    assert len({inputs["input_ids"].shape for inputs in alone}) == 3
    calibrate(patch_model(zinc, "poly3"), [padded], progress=False)
    together, apart = diagnose(zinc, [padded], progress=False), diagnose(zinc, alone, progress=False)
    control = diagnose(zinc, [padded["input_ids"]], progress=False)
    assert together.layers[0].rows == apart.layers[0].rows == 25.0
    for name in ("softmax_norm", "polynomial_norm", "softmax_jacobian", "polynomial_jacobian", "score_range", "below"):
        torch.testing.assert_close(by_head(together, name), by_head(apart, name), rtol=1e-3, atol=1e-4)
    for name in ("softmax_norm", "polynomial_norm", "softmax_jacobian", "polynomial_jacobian"):
        assert ((by_head(control, name) - by_head(apart, name)).abs() > 1e-2 * by_head(apart, name)).any(), name


def test_blocks_change_nothing_and_sampled_rows_little(
    zinc: Any, batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [batch("gpt2-zinc", count=4, length=40)]
    calibrate(patch_model(zinc, "poly4-l1"), batches, progress=False)
    whole = diagnose(zinc, batches, progress=False)
    monkeypatch.setattr(hf_polyattn.diagnosis.diagnosis, "_BLOCK_SCORES", 700)  # two or three rows of eight heads
    blocks = diagnose(zinc, batches, progress=False)
    monkeypatch.setattr(hf_polyattn.diagnosis.diagnosis, "MAX_ROWS", 60)
    sampled = diagnose(zinc, batches, progress=False)
    assert sampled.layers[0].rows == whole.layers[0].rows
    for name in ("softmax_norm", "polynomial_norm", "softmax_jacobian", "polynomial_jacobian"):
        torch.testing.assert_close(by_head(blocks, name), by_head(whole, name))
        torch.testing.assert_close(by_head(sampled, name), by_head(whole, name), rtol=0.3, atol=0.0)
        assert not torch.equal(by_head(sampled, name), by_head(whole, name))


def test_scores_that_leave_the_interval_are_counted(zinc: Any, batch: Callable[..., Batch]) -> None:
    batches = [batch("gpt2-zinc", count=3, length=40)]
    calibrate(patch_model(zinc, "poly6-l1"), batches, progress=False)
    before = diagnose(zinc, batches, progress=False)
    with torch.no_grad():  # the queries of the first layer grow in training
        zinc.transformer.h[0].attn.c_attn.weight[:, : zinc.config.n_embd].mul_(4.0)
    after = diagnose(zinc, batches, progress=False)
    assert by_head(before, "above").max() == 0.0
    assert by_head(after, "above")[0].mean() > 0.01
    assert after.layers[0].score_range[0][1] > 1.0 >= before.layers[0].score_range[0][1]
    assert "leave the calibrated interval at its top (transformer.h.0.attn" in after.verdict
    assert "interval at its top" not in before.verdict


def test_non_finite_numbers_are_reported_and_not_raised(zinc: Any, batch: Callable[..., Batch]) -> None:
    batches = [batch("gpt2-zinc", count=2, length=30)]
    patch_model(zinc, "poly3")
    assert not any(any(layer.non_finite) for layer in diagnose(zinc, batches, progress=False).layers)
    with torch.no_grad():
        zinc.transformer.h[1].attn.polyattn.coefficients[0, 3] = torch.inf
    one = diagnose(zinc, batches, progress=False)
    assert [any(layer.non_finite) for layer in one.layers] == [False, True, False, False]
    assert "not finite (transformer.h.1.attn)" in one.verdict
    with torch.no_grad():
        zinc.transformer.h[2].attn.c_attn.weight[0, 0] = torch.nan
    two = diagnose(zinc, batches, progress=False)
    assert [any(layer.non_finite) for layer in two.layers] == [False, True, True, True]
    written = json.loads(json.dumps(two.to_dict(), allow_nan=False))
    assert written["layers"][3]["softmax_norm"][0] is None
    assert written["layers"][0]["softmax_norm"][0] == two.layers[0].softmax_norm[0]


def test_plot_is_a_picture_in_the_format_of_its_suffix(zinc: Any, batch: Callable[..., Batch], tmp_path: Path) -> None:
    found = diagnose(patch_model(zinc, "poly3"), [batch("gpt2-zinc")], progress=False)
    found.plot(tmp_path / "norms.png")
    found.plot(str(tmp_path / "norms.svg"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["norms.png", "norms.svg"]
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "norms.svg").read_text()


def test_what_cannot_be_diagnosed_raises(zinc: Any, batch: Callable[..., Batch]) -> None:
    inputs = batch("gpt2-zinc")
    with pytest.raises(PatchError, match=r"not patched; call patch_model\(model, spec\)"):
        diagnose(zinc, [inputs])
    patch_model(zinc, "poly3")
    inputs["attention_mask"].zero_()
    with pytest.raises(InputError, match=r"no query row of 'transformer.h.0.attn' that is not padding"):
        diagnose(zinc, [inputs], progress=False)
