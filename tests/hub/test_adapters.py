"""Adapters bring the polynomials that they were trained on, or refuse: none of them runs on softmax in silence."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_polyattn as hp
from hf_polyattn.patching.core import PolyAttention
from hf_polyattn.patching.patched import patched_layers

peft = pytest.importorskip("peft")
FILE = "polyattn.safetensors"


@torch.no_grad()
def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**inputs)[0]


def lora(**kwargs: Any) -> Any:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **kwargs)


def trained(model: Any, config: Any = None) -> Any:
    """A model with an adapter that does something."""
    model = peft.get_peft_model(model, config or lora())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def softmax(pretrained: Any) -> Callable[[], Any]:
    return lambda: pretrained("llama", "AutoModelForCausalLM")


@pytest.fixture(scope="module")
def calibrated_once(pretrained: Any, batch: Any) -> Callable[[str], Any]:
    @functools.cache
    def make(spec: str) -> Any:
        model = hp.patch_model(pretrained("llama", "AutoModelForCausalLM"), spec)
        hp.calibrate(model, [batch("llama", 4)], progress=False)
        return model

    return make


@pytest.fixture
def patched(calibrated_once: Any) -> Callable[..., Any]:
    """`patched(spec)`: the Llama, patched and calibrated in memory."""
    return lambda spec="poly6-l1": copy.deepcopy(calibrated_once(spec))


def by_peft(base: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, folder)


def by_auto_class(base: Any, folder: Path) -> Any:
    return peft.AutoPeftModelForCausalLM.from_pretrained(folder)


def into_subfolder(base: Any, folder: Path) -> Any:
    (folder / "sub").mkdir()
    for file in [file for file in folder.iterdir() if file.is_file()]:
        file.rename(folder / "sub" / file.name)
    return peft.PeftModel.from_pretrained(base, folder, subfolder="sub")


def by_transformers(base: Any, folder: Path) -> Any:
    base.load_adapter(str(folder))
    return base


def by_auto_model(base: Any, folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def merged(base: Any, folder: Path) -> Any:
    return by_peft(base, folder).merge_and_unload()


WAYS = {way.__name__: way for way in (by_peft, by_auto_class, into_subfolder, by_transformers, by_auto_model, merged)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", ["poly6-l1", "poly3"])
def test_an_adapter_patches_its_softmax_base(
    spec: str, way: str, patched: Any, softmax: Any, batch: Any, tmp_path: Path
) -> None:
    inputs, model = batch("llama"), trained(patched(spec))
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = WAYS[way](softmax(), tmp_path)
    difference = (output(loaded, inputs) - expected).abs().max() / expected.abs().max()
    assert difference < (1e-4 if way == "merged" else 1e-6)
    with hp.softmax_attention(model):
        assert not torch.allclose(output(model, inputs), expected, rtol=0.01)
    for (_, ours), (_, theirs) in zip(patched_layers(loaded), patched_layers(model), strict=True):
        assert ours.config == theirs.config
        assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_an_adapter_on_a_saved_polynomial_base(patched: Any, batch: Any, tmp_path: Path) -> None:
    inputs = batch("llama")
    patched().save_pretrained(tmp_path / "base")
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(loaded, inputs), output(model, inputs))


def test_a_freshly_patched_base_is_calibrated_as_the_adapter_says(
    patched: Any, softmax: Any, batch: Any, tmp_path: Path
) -> None:
    model = trained(patched("poly4-l1"))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(hp.patch_model(softmax(), "poly4-l1"), tmp_path)
    assert torch.equal(output(loaded, batch("llama")), output(model, batch("llama")))


def test_another_polynomial_is_refused_and_left_as_it_was(
    patched: Any, softmax: Any, batch: Any, tmp_path: Path
) -> None:
    trained(patched("poly4-l1")).save_pretrained(tmp_path)
    inputs = batch("llama")
    calibrated = hp.patch_model(softmax(), "poly4-l1")
    hp.calibrate(calibrated, [batch("llama", 2, 12)], progress=False)
    cases = [
        (hp.patch_model(softmax(), "poly3"), "was trained with poly4-l1 at .*, where the base model has poly3"),
        (hp.patch_model(softmax(), "poly4-l1", layers=[0]), "poly4-l1 at .*, where the base model has softmax"),
        (calibrated, r"polynomials at .*layers.0.self_attn.* are not those that the adapter was trained on.*unpatch"),
    ]
    for base, message in cases:
        before = output(base, inputs)
        with pytest.raises(hp.PatchError, match=message):
            peft.PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(output(base, inputs), before)
    assert hp.is_patched(peft.PeftModel.from_pretrained(hp.unpatch_model(calibrated), tmp_path))  # as the message says


def test_a_second_adapter_does_not_make_the_first_polynomial(patched: Any, softmax: Any, tmp_path: Path) -> None:
    trained(patched()).save_pretrained(tmp_path / "polynomial")
    model = trained(softmax())
    model.save_pretrained(tmp_path / "softmax")
    assert not (tmp_path / "softmax" / FILE).exists()
    with pytest.raises(hp.PatchError, match="other adapters of this model run on softmax"):
        model.load_adapter(tmp_path / "polynomial", "second")
    assert not hp.is_patched(model)
    both = peft.PeftModel.from_pretrained(softmax(), tmp_path / "polynomial")
    both.load_adapter(tmp_path / "polynomial", "second")  # of the same polynomials
    both.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / FILE).is_file()
    assert (tmp_path / "both/second" / FILE).is_file()


def test_trained_copies_come_back_onto_softmax(patched: Any, softmax: Any, batch: Any, tmp_path: Path) -> None:
    inputs, model = batch("llama"), trained(patched(), lora(modules_to_save=["polyattn"]))
    base = output(model, inputs)
    with torch.no_grad():
        for _, layer in patched_layers(model):
            layer.coefficients.mul_(1.0 + 0.5 * torch.rand(layer.coefficients.shape))
    expected = output(model, inputs)
    assert not torch.allclose(expected, base, rtol=0.01)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(softmax(), tmp_path)
    assert torch.equal(output(loaded, inputs), expected)
    with loaded.disable_adapter(), model.disable_adapter():
        assert torch.equal(output(loaded, inputs), output(model, inputs))
    (tmp_path / FILE).unlink()  # as version 0.1.0 saved
    with pytest.raises(hp.PatchError, match=r"trained polynomial attention at .*layers.0.self_attn.*patch_model"):
        peft.PeftModel.from_pretrained(softmax(), tmp_path)


def test_an_adapter_goes_back_to_a_checkpoint_of_its_own(patched: Any, batch: Any, tmp_path: Path) -> None:
    """As `Trainer` does when it resumes, and for `load_best_model_at_end`."""
    model, inputs = trained(patched()), batch("llama")
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for _, layer in patched_layers(model):  # unfrozen by their owner, and trained
            layer.coefficients.mul_(1.0 + 0.5 * torch.rand(layer.coefficients.shape))
    assert not torch.allclose(output(model, inputs), expected, rtol=0.01)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(output(model, inputs), expected)


def test_patching_below_an_adapter_freezes_and_saves(softmax: Any, batch: Any, tmp_path: Path) -> None:
    inputs, model = batch("llama"), hp.patch_model(trained(softmax()), "poly3")
    hp.calibrate(model, [batch("llama", 4)], progress=False)
    assert not [name for name, parameter in model.named_parameters() if "polyattn" in name and parameter.requires_grad]
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(softmax(), tmp_path)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    assert not torch.allclose(output(loaded, inputs), output(trained(softmax()), inputs), rtol=0.01)

    with pytest.raises(hp.PatchError, match=r"modules_to_save=\['polyattn'\], but were made before"):
        hp.patch_model(trained(softmax(), lora(modules_to_save=["polyattn"])), "poly3")


def test_adapters_of_coefficients_are_refused(patched: Any, batch: Any) -> None:
    model, inputs = patched("poly3"), batch("llama")
    expected = output(model, inputs)
    for targets in ({"target_parameters": ["polyattn.coefficients"]}, {"target_modules": ["q_proj", "polyattn"]}):
        config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **targets})
        with pytest.raises(hp.PatchError, match=r"polyattn.*as targets.*modules_to_save=\['polyattn'\]"):
            peft.get_peft_model(model, config)
    assert all(type(layer) is PolyAttention for _, layer in patched_layers(model))
    assert torch.equal(output(model, inputs), expected)


def damaged(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with safe_open(file, framework="pt") as content:
            state = json.loads(content.metadata()["polyattn_config"])
        tensors = load_file(file)
        change(tensors, state)
        save_file(tensors, file, metadata={"polyattn_config": json.dumps(state)})

    return damage


def another_layer(tensors: dict[str, Any], state: dict[str, Any]) -> None:
    state["modules"]["layers.77.self_attn"] = "poly3"
    tensors |= {key.replace(".0.", ".77."): value.clone() for key, value in tensors.items() if ".0." in key}


FIRST = "layers.0.self_attn.polyattn"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:100]), "cannot be read"),
    "lacking": (damaged(lambda tensors, state: tensors.pop(f"{FIRST}.radius")), rf"lacks \['{FIRST}.radius'\]"),
    "not finite": (damaged(lambda tensors, state: tensors[f"{FIRST}.center"].fill_(torch.nan)), "NaN or infinite"),
    "without config": (lambda file: save_file(load_file(file), file), "cannot read polyattn_config"),
    "later": (damaged(lambda tensors, state: state.update(format_version=99)), "format_version 99"),
    "of other layers": (
        damaged(another_layer),
        "has a polynomial for 'layers.77.self_attn', where LlamaForCausalLM has no attention",
    ),
    "of other heads": (
        damaged(lambda tensors, state: tensors.update({f"{FIRST}.center": torch.zeros(3)})),
        "the polynomial of 'layers.0.self_attn' is of another model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_polynomials_beside_an_adapter_are_refused(
    case: str, patched: Any, softmax: Any, batch: Any, tmp_path: Path
) -> None:
    damage, message = DAMAGE[case]
    trained(patched("poly3")).save_pretrained(tmp_path)
    damage(tmp_path / FILE)
    base = softmax()
    with pytest.raises((hp.CheckpointError, hp.SpecError), match=message):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert not hp.is_patched(base)
    assert torch.equal(output(base, batch("llama")), output(softmax(), batch("llama")))
