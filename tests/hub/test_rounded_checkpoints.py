"""A checkpoint whose tensors somebody cast, all of them, has other polynomials than were calibrated: that is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_polyattn as hp

WARNED = "has polynomials in torch.bfloat16: they are not those that were calibrated any more"


def cast(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    wanted = {"all": lambda name: True, "weights": lambda name: "polyattn" not in name}[part]
    return {n: t.bfloat16() if t.is_floating_point() and wanted(n) else t for n, t in tensors.items()}


def by_state_dict(model: Any, part: str, folder: Path) -> Any:
    model.load_state_dict(cast(model.state_dict(), part))
    return model


def by_from_pretrained(model: Any, part: str, folder: Path) -> Any:
    model.save_pretrained(folder)
    tensors = cast(load_file(folder / "model.safetensors"), part)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


WAYS: dict[str, Callable[[Any, str, Path], Any]] = {
    "load_state_dict": by_state_dict,
    "from_pretrained": by_from_pretrained,
}


@pytest.mark.parametrize("way", WAYS)
def test_polynomials_that_were_rounded_are_named(way: str, pretrained: Any, batch: Any, tmp_path: Path) -> None:
    def patched() -> Any:
        model = hp.patch_model(pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=1), "poly6-l1")
        hp.calibrate(model, [batch("llama", 4)], row_shift="linear", progress=False)
        return model

    @torch.no_grad()
    def difference(model: Any) -> float:
        return float((model(**batch("llama"))[0] - expected).abs().max() / expected.abs().max())

    with torch.no_grad():
        expected = patched()(**batch("llama"))[0]
    with pytest.warns(UserWarning, match=WARNED):
        rounded = difference(WAYS[way](patched(), "all", tmp_path / "all"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=WARNED)
        assert difference(WAYS[way](patched(), "weights", tmp_path / "weights")) < 0.5 * rounded
        bare = hp.patch_model(pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=1), "poly3")
        WAYS[way](bare, "all", tmp_path / "bare")  # 0 and 1 survive


def test_polynomials_that_were_cast_one_by_one_are_refused(pretrained: Any, batch: Any) -> None:
    model = hp.patch_model(pretrained("llama", "AutoModelForCausalLM", num_hidden_layers=1), "poly4-l1")
    hp.calibrate(model, [batch("llama", 4)], progress=False)
    model.to(torch.bfloat16)(**batch("llama"))  # the control
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.raises(
        hp.PatchError, match=r"cast to torch.bfloat16, one by one.*Load the model again.*model.to\(dtype\)"
    ):
        model(**batch("llama"))
