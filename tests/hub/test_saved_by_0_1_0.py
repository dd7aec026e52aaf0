"""What version 0.1.0 saved, calibrated, loads to the bit and answers as it did then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_polyattn as hp
from hf_polyattn.patching.patched import spec_of

FOLDER = Path(__file__).parent / "saved_by_0_1_0"
SPECS = {"bert": "poly6-l1", "gpt2": "poly3", "llama": "poly3^16-l1", "vit": "poly4-mean"}


@pytest.mark.parametrize("name", SPECS)
def test_a_checkpoint_of_version_0_1_0_loads_to_the_bit_and_answers_as_it_did(name: str, tmp_path: Path) -> None:
    import transformers

    folder = FOLDER / name
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, loading = kind.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert spec_of(model) == SPECS[name]

    answers = load_file(folder / "answers.safetensors")
    expected = answers.pop("output")
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in answers.items()}
    with torch.no_grad():
        output = model.double()(**inputs)[0]
        with hp.softmax_attention(model):
            softmax = model(**inputs)[0]
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(softmax, expected, rtol=1e-4, atol=1e-4)

    model.float().save_pretrained(tmp_path)  # float32 to float64 and back is exact
    again, saved = (load_file(place / "model.safetensors") for place in (tmp_path, folder))
    assert sum("polyattn" in key for key in saved) == 8
    assert sum("polyattn" in key for key in again) == 14
    added = tuple(f".polyattn.{name}" for name in ("settings", "delta", "directions"))
    assert {key for key in again if not key.endswith(added)} == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)
