"""What calibration cannot know or do is said: offloaded weights, too few rows, no clamp, no coefficients."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import hf_polyattn as hp
from hf_polyattn.errors import PatchError
from hf_polyattn.patching.patched import patched_layers

NAMES = {"minilm": "AutoModel", "llama": "AutoModelForCausalLM"}
both = pytest.mark.parametrize("name", NAMES)


def offload(way: str, model: Any, folder: Path) -> None:
    if way == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


@both
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_offloaded_models_are_refused_by_name(
    name: str, way: str, pretrained: Any, polynomial: Any, batch: Any, tmp_path: Path
) -> None:
    model = pretrained(name, NAMES[name], num_hidden_layers=1)
    offload(way, model, tmp_path / "softmax")
    with pytest.raises(PatchError, match=r"cannot be patched: weights are offloaded, at '.*Load it whole"):
        hp.patch_model(model, "poly3")
    assert not hp.is_patched(model)

    model = polynomial(pretrained(name, NAMES[name], num_hidden_layers=1))
    with torch.no_grad():
        expected = model(**batch(name))[0]
    offload(way, model, tmp_path / "polynomial")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch(name))[0], expected)
    for tool in (hp.calibrate, hp.diagnose):
        with pytest.raises(PatchError, match="cannot be calibrated or diagnosed: weights are offloaded"):
            tool(model, [batch(name)], progress=False)
    with pytest.raises(PatchError, match="cannot be trained: weights are offloaded"):
        hp.distill(model, [batch(name)], steps=1, progress=False)


@both
def test_too_few_rows_are_said(name: str, pretrained: Any, batch: Any, recwarn: Any) -> None:
    model = hp.patch_model(pretrained(name, NAMES[name], num_hidden_layers=2), "poly3")
    head_dim = patched_layers(model)[0][1].head_dim
    few = {key: value[:1, :2] for key, value in batch(name).items()}
    with pytest.warns(UserWarning, match=rf"^2 rows a layer are too few for {head_dim + 1} unknowns a head.*at least"):
        report = hp.calibrate(model, [few], progress=False)
    assert "too few" in str(report)
    assert "every layer fits" not in str(report)
    with pytest.warns(UserWarning, match=r"too few for 4 unknowns"):
        hp.calibrate(model, [few], progress=False, key_shift=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = hp.calibrate(model, [batch(name, 10, 80)], progress=False)
    assert report.rows >= 4 * report.unknowns
    assert "too few" not in str(report)


@torch.no_grad()
def far_out(model: Any, inputs: dict[str, Tensor]) -> float:
    """The largest output of the first polynomial on scores far outside of its interval."""
    layer = patched_layers(model)[0][1]
    query, key, value = torch.randn(3, 1, layer.heads, 5, layer.head_dim).unbind()
    return float(layer(100 * query, 100 * key, value).abs().max())


@both
@pytest.mark.parametrize("spec", ["poly3", "poly4-l1"])
def test_a_clamp_that_was_refused_stays_away(name: str, spec: str, pretrained: Any, batch: Any, tmp_path: Path) -> None:
    inputs = batch(name, 8, 60)
    models = {}
    for clamp in (False, None, True):
        config = hp.PolyAttentionConfig(spec, clamp=clamp)
        model = hp.patch_model(pretrained(name, NAMES[name], num_hidden_layers=1), config)
        hp.calibrate(model, [inputs], row_shift="linear", progress=False)
        models[clamp] = model
        assert all(layer.config.clamp is (clamp is not False) for _, layer in patched_layers(model))
    if spec == "poly3":
        assert far_out(models[False], inputs) > 100 * far_out(models[True], inputs)
    models[False].save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert [layer.config.clamp for _, layer in patched_layers(loaded)] == [False]
    hp.calibrate(loaded, [inputs], progress=False)
    assert [layer.config.clamp for _, layer in patched_layers(loaded)] == [False]
    with pytest.raises(hp.errors.SpecError, match="clamp must be True, False or None"):
        hp.PolyAttentionConfig(spec, clamp="no")


@both
def test_a_calibrated_config_without_weights_says_that_it_is_uncalibrated(
    name: str, pretrained: Any, batch: Any, tmp_path: Path, recwarn: Any
) -> None:
    auto = AutoModel if name == "minilm" else AutoModelForCausalLM
    model = hp.patch_model(pretrained(name, NAMES[name], num_hidden_layers=1), "poly3")
    auto.from_config(model.config)  # uncalibrated, and says nothing else
    hp.calibrate(model, [batch(name, 8, 60)], progress=False)
    model.save_pretrained(tmp_path)
    auto.from_pretrained(tmp_path)
    assert not [warning for warning in recwarn if "uncalibrated" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"the model is uncalibrated.*calibrate\(model, batches\)"):
        auto.from_config(model.config)
