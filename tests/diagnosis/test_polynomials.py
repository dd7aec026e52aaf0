"""The polynomials of calibrated models as plain numbers: they give the weights that the model computes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial as NumpyPolynomial
from torch import Tensor

import hf_polyattn as hp
from hf_polyattn.diagnosis.inspection import scaled_scores
from hf_polyattn.patching.core import PolyAttention
from hf_polyattn.patching.patched import patched_layers

AUTO_CLASS = {"minilm": "AutoModel", "gpt2-zinc": "AutoModelForCausalLM"}


@pytest.fixture(scope="module")
def calibrated(pretrained: Any, batch: Any) -> Any:
    """`calibrated(name, spec, row_shift, clamp)`: two layers of a checkpoint, calibrated on real rows."""

    def make(name: str, spec: str, row_shift: str, clamp: bool | None) -> Any:
        model = pretrained(name, AUTO_CLASS[name], num_hidden_layers=2)
        hp.patch_model(model, hp.PolyAttentionConfig(spec, clamp=clamp))
        hp.calibrate(model, [batch(name, 8, 60)], row_shift=row_shift, progress=False)
        return model

    return make


def rows_of(model: Any, inputs: dict[str, Tensor]) -> tuple[PolyAttention, Tensor, Tensor, Tensor]:
    """Returns the second layer, and what its attention gets of the first sequence: query, key, value in float64."""
    layer = patched_layers(model)[1][1]
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: seen.extend(args[:3]))
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:1])
    hook.remove()
    query, key, value = (x.double() for x in seen)
    return layer, query, key, value


def of_head(coefficients: tuple[float, ...], scores: Tensor) -> np.ndarray[Any, Any]:
    return NumpyPolynomial(coefficients)(scores.numpy())  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize(
    ("spec", "row_shift"),
    [("poly3", "none"), ("poly4", "moments"), ("poly3~1", "moments"), ("poly2^4", "linear")],
    ids=lambda word: word,
)
def test_the_polynomial_of_scores_is_the_attention_of_a_calibrated_model(
    spec: str, row_shift: str, calibrated: Any, batch: Any
) -> None:
    """Raw scores where no row is shifted, else less the shift that the model computes."""
    model = calibrated("minilm", spec, row_shift, False)
    layer, query, key, value = rows_of(model, batch("minilm", 8, 60))
    scaling = layer.head_dim**-0.5
    with torch.no_grad():
        weights = layer(query, key, value, return_weights=True)[1]
        shift = torch.zeros(weights.shape[:3], dtype=torch.float64)
        if row_shift != "none":
            shift = layer.row_centers(query, key, scaling=scaling) - layer.center.double()[:, None]
    assert weights.dtype == torch.float64
    found = hp.polynomials(model).layers[1]
    scores = scaled_scores(query, key, scaling) - shift.unsqueeze(-1)
    for head, polynomial in enumerate(found.heads):
        expected = weights[0, head] * weights.shape[-1] ** 0.5
        by_score = of_head(polynomial.in_score, scores[0, head]) ** found.power
        assert polynomial.interval is not None
        middle, radius = np.mean(polynomial.interval), np.ptp(polynomial.interval) / 2
        by_interval = of_head(polynomial.in_interval, (scores[0, head] - middle) / radius) ** found.power
        size = float(expected.abs().max())
        np.testing.assert_allclose(by_score, expected, rtol=0, atol=1e-11 * size)
        np.testing.assert_allclose(by_interval, expected, rtol=0, atol=1e-11 * size)
        other = of_head(found.heads[head - 1].in_score, scores[0, head]) ** found.power
        assert np.abs(other - expected.numpy()).max() > 1e-3 * size  # heads differ


def test_a_causal_model_and_its_scores_are_measured(calibrated: Any, batch: Any) -> None:
    inputs = batch("gpt2-zinc", 8, 60)
    model = calibrated("gpt2-zinc", "poly3", "moments", True)
    assert hp.polynomials(model).layers[0].heads[0].score_range is None
    found = hp.polynomials(model, [inputs], progress=False)
    report = hp.calibrate(model, [inputs], row_shift="moments", progress=False)
    for layer, calibration in zip(found.layers, report.layers, strict=True):
        for head, seen in zip(layer.heads, calibration.score_range, strict=True):
            assert head.score_range == pytest.approx(seen, rel=1e-6)
            assert head.shifted_range is not None
            assert head.interval is not None
            # the top of an interval is half a nat above the largest shifted score of the calibration
            assert head.shifted_range[1] == pytest.approx(head.interval[1] - 0.5, abs=1e-3)
    assert json.loads(json.dumps(found.to_dict()))["layers"][1]["heads"][0]["in_score"]
    assert "not measured" not in str(found)


def test_depth_and_products_count_what_the_formula_multiplies(pretrained: Any) -> None:
    model = pretrained("minilm", num_hidden_layers=1)
    expected = {
        "poly1": (2, 0),
        "poly3": (4, 0),
        "poly3-l1": (5, 1),
        "poly6-l1": (6, 1),
        "poly3^16-l1": (9, 1),
        "poly3~1": (8, 0),
    }
    for spec, (depth, divisions) in expected.items():
        hp.unpatch_model(model) if hp.is_patched(model) else None
        layer = hp.polynomials(hp.patch_model(model, spec)).layers[0]
        assert (layer.depth, layer.divisions) == (depth, divisions), spec
    shifted = hp.PolyAttentionConfig("poly3", row_shift="moments", squares=2)
    hp.unpatch_model(model)
    layer = hp.polynomials(hp.patch_model(model, shifted)).layers[0]
    assert layer.depth == 7
    heads, dim, length = 12, 32, 10
    assert layer.products(length) == {
        "scores": heads * length * length * dim,
        "row shift": heads * (length * length + length * (4 + 2)),
        "refinements": 0,
        "polynomial": heads * length * length * 2,
        "values": heads * length * length * dim,
        "row sum": 0,
    }
    assert layer.ciphertexts(length) == 2 + 1 + 1 + 2
    powered = replace(layer, power=4, row_shift="none")
    assert powered.products(length)["polynomial"] == heads * length * length * 4
    assert powered.products(length)["row shift"] == 0


def test_a_softmax_model_has_none(pretrained: Any) -> None:
    with pytest.raises(hp.PatchError, match="BertModel is not patched; call patch_model"):
        hp.polynomials(pretrained("minilm", num_hidden_layers=1))
