"""`hp.plot` draws what models do: each number in a picture is held to the model or the report it comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import hf_polyattn as hp
from hf_polyattn.plot.seen import attention_map, head_curves

Pretrained = Callable[..., Any]


@pytest.fixture(scope="module")
def calibrated(pretrained: Pretrained, batch: Callable[..., Any]) -> tuple[Any, hp.CalibrationReport, Any]:
    """gpt2-zinc as poly3, its report, and molecules padded on the right."""
    model = hp.patch_model(pretrained("gpt2-zinc"), "poly3")
    batches = [batch("gpt2-zinc", 8, 60)]
    with pytest.warns(UserWarning, match="rows a layer are too few"):
        report = hp.calibrate(model, batches, progress=False)
    return model, report, batches


def test_maps_are_softmax_and_the_model_s_own_weights(
    calibrated: Any, pretrained: Pretrained, batch: Callable[..., Any]
) -> None:
    model, _, _ = calibrated
    inputs = batch("gpt2-zinc", 1, 20)
    found = attention_map(model, inputs, 0, 0)  # the first layer sees the same whatever runs
    ours = model(**inputs, output_attentions=True).attentions[0][0, 0]
    eager = pretrained("gpt2-zinc", attn_implementation="eager")
    softmax = eager(**inputs, output_attentions=True).attentions[0][0, 0]
    numpy.testing.assert_allclose(found.polynomial, ours.detach().numpy(), atol=1e-6)
    numpy.testing.assert_allclose(found.softmax, softmax.detach().numpy(), atol=1e-6)
    assert abs(found.softmax - found.polynomial).max() > 1e-3  # the control: they are two models
    numpy.testing.assert_allclose(found.softmax.sum(1), 1.0, atol=1e-5)


def test_maps_leave_padding_out(calibrated: Any, batch: Callable[..., Any]) -> None:
    model, _, _ = calibrated
    inputs = batch("gpt2-zinc", 2, 20)
    second = {name: tensor[1:] for name, tensor in inputs.items()}
    length = int(second["attention_mask"].sum())
    assert length < second["attention_mask"].shape[1]
    tokens = [f"t{i}" for i in range(second["attention_mask"].shape[1])]
    found = attention_map(model, second, 1, 0, tokens=tokens)
    assert found.softmax.shape == (length, length)
    assert found.keys == tuple(tokens[:length])


def test_a_map_lies_over_the_picture(pretrained: Pretrained, batch: Callable[..., Any]) -> None:
    model = hp.patch_model(pretrained("vit"), "poly3^16-l1", layers=[3])
    inputs = batch("vit", 1)
    found = attention_map(model, inputs, 0, 2)
    assert found.grid == (14, 14)
    assert found.picture.shape == (224, 224, 3)
    assert (found.picture.min(), found.picture.max()) == (0.0, 1.0)
    figure = hp.plot.maps(model, inputs, "layers.3.attention", 2, query=0)
    picture, softmax, *_ = figure.axes
    numpy.testing.assert_array_equal(picture.images[0].get_array(), found.picture)
    numpy.testing.assert_allclose(softmax.images[1].get_array().ravel(), found.softmax[0, 1:])


def test_curves_are_the_polynomial_and_exp_where_the_interval_lies(calibrated: Any) -> None:
    model, report, batches = calibrated
    title, (curve,) = head_curves(model, report, layer=0, batches=batches)
    assert title == f"{report.layers[0].path} · poly3"
    scores = torch.tensor(curve.scores, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(curve.exponential, dtype=torch.float64), scores.exp())
    low, high = report.layers[0].interval[0]
    t = ((scores - (low + high) / 2) / ((high - low) / 2)).clamp(-1, 1)
    c = model.h[0].attn.polyattn.coefficients.detach().double()[0]
    expected = sum(c[k] * t**k for k in range(4))
    torch.testing.assert_close(torch.tensor(curve.polynomial, dtype=torch.float64), expected, atol=1e-5, rtol=1e-5)
    assert sum(curve.counts) == pytest.approx(1.0)
    inside = [c for c, edge in zip(curve.counts, curve.edges[1:], strict=True) if edge <= high]
    assert sum(inside) > 0.99  # scores above the interval are few


def test_curves_show_the_layer_that_fits_worst(calibrated: Any) -> None:
    model, report, _ = calibrated
    worst = min(report.layers, key=lambda layer: layer.explained_variance[0])
    title, _ = head_curves(model, report)
    assert title.startswith(worst.path)
    assert hp.plot.heads(model, report).get_suptitle() == title
    first, _ = head_curves(model, None)
    assert first.startswith(report.layers[0].path)


def test_dial_draws_every_layer_of_every_report(calibrated: Any) -> None:
    _, report, _ = calibrated
    left, _ = hp.plot.dial([report, report]).axes
    assert len(left.lines) == 2
    expected = [1.0 - layer.explained_variance[0] for layer in report.layers]
    assert left.lines[0].get_ydata() == pytest.approx(expected)
    assert len(hp.plot.dial(report).axes[0].lines) == 1
    with pytest.raises(hp.InputError, match="reports of calibrate or convert, got 'poly3'"):
        hp.plot.dial("poly3")


def test_norms_are_those_of_the_diagnosis_and_its_plot(calibrated: Any, tmp_path: Path) -> None:
    model, _, batches = calibrated
    found = hp.diagnose(model, batches, progress=False)
    left, _ = hp.plot.norms(found).axes
    assert left.lines[1].get_ydata() == pytest.approx([layer.polynomial_norm[0] for layer in found.layers])
    found.plot(tmp_path / "norms.svg")
    assert (tmp_path / "norms.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((9, 0), r"patched layers are 0 to 3, at .*; got 9"),
        (("h.7", 0), r"patched layers are 0 to 3, at .*; got 'h.7'"),
        ((0, 1), r"layer 'h.0.attn' has heads 0 to 0, got 1"),
    ],
)
def test_what_is_not_there_is_named(calibrated: Any, words: Any, message: str) -> None:
    model, _, batches = calibrated
    with pytest.raises(hp.InputError, match=message):
        hp.plot.maps(model, batches[0], *words)


def test_a_softmax_model_is_refused(pretrained: Pretrained, batch: Callable[..., Any]) -> None:
    with pytest.raises(hp.PatchError, match="call patch_model"):
        hp.plot.maps(pretrained("gpt2-zinc"), batch("gpt2-zinc", 1), 0, 0)
