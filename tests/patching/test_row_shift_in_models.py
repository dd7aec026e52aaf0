"""Models whose rows are shifted by moments and by a refinement: saved, cached, padded, trained, compiled, exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_classes import AUTO_CLASSES
from torch import Tensor

import hf_polyattn as hp
from hf_polyattn.patching.patched import patched_layers

each = pytest.mark.parametrize("name", AUTO_CLASSES)
decoders = pytest.mark.parametrize("name", ["gpt2-zinc", "llama"])


@pytest.fixture(scope="module")
def shifted(pretrained: Any, batch: Any) -> Any:
    """`shifted(name, spec)`: two layers, calibrated with moments and squares, in float64; a copy each time."""
    made: dict[tuple[str, str], Any] = {}

    def make(name: str, spec: str = "poly3~1") -> Any:
        if (name, spec) not in made:
            model = hp.patch_model(pretrained(name, AUTO_CLASSES[name], num_hidden_layers=2), spec)
            hp.calibrate(model, [batch(name, 8, 40)], row_shift="moments", squares=4, progress=False)
            made[name, spec] = model.double().eval()
        return copy.deepcopy(made[name, spec])

    return make


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs)[0]
    return found


@each
@torch.no_grad()
def test_every_part_of_the_shift_is_saved_and_counts(name: str, shifted: Any, batch: Any, tmp_path: Path) -> None:
    model, inputs = shifted(name), doubled(batch(name, 4, 30))
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).double()
    torch.testing.assert_close(output(loaded, inputs), expected, rtol=1e-5, atol=1e-5)  # saved in float32
    tensors = {tensor for tensor, _ in patched_layers(model)[0][1].named_parameters()}
    assert {"moments.weights", "moments.squares", "refinements.0.steps"} <= tensors
    without_change = {tensor for tensor in tensors if tensor.endswith("directions")}  # of nothing, where δ is 0
    for tensor in (
        tensors - without_change - {"moments.lengths"} - ({"moments.length_shift"} if name == "vit" else set())
    ):  # one length
        changed = copy.deepcopy(model)
        for _, layer in patched_layers(changed):
            layer.get_parameter(tensor).mul_(1.5).add_(0.3)
        assert not torch.allclose(output(changed, inputs), expected, rtol=1e-3, atol=1e-3), tensor


@decoders
@torch.no_grad()
def test_decoding_with_a_cache_is_the_full_pass(name: str, shifted: Any, batch: Any) -> None:
    model, tokens = shifted(name), batch(name, 2, 24)["input_ids"]
    whole = output(model, {"input_ids": tokens})
    cache, parts = None, []
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 12)):
        found = model(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        parts.append(found.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, :12], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["minilm", "gpt2-zinc", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(name: str, side: str, shifted: Any, batch: Any) -> None:
    model, tokens = shifted(name), batch(name, 1, 20)["input_ids"][:, :20]
    length = tokens.shape[1]
    pad = (6, 0) if side == "left" else (0, 6)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), pad)
    inputs = {"input_ids": torch.nn.functional.pad(tokens, pad, value=7), "attention_mask": mask}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(**inputs, position_ids=positions)[0][:, pad[0] : pad[0] + length]
    torch.testing.assert_close(padded, output(model, {"input_ids": tokens}), rtol=1e-9, atol=1e-9)


@each
def test_every_parameter_gets_the_gradient_of_finite_differences(name: str, shifted: Any) -> None:
    """Of a layer by itself: a Llama's norms compute in float32 whatever it is cast to."""
    model = shifted(name)
    module = next(module for module in model.modules() if "polyattn" in module._modules)
    layer = patched_layers(model)[0][1]
    groups = layer.heads // getattr(module, "num_key_value_groups", 1)
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    operands = [noise(2, heads, 15, layer.head_dim) for heads in (layer.heads, groups, groups)]
    direction = noise(2, 15, layer.heads, layer.head_dim)
    wanted = [*(p for p in layer.parameters() if p.requires_grad), *(tensor.requires_grad_() for tensor in operands)]

    def loss() -> Tensor:
        return (layer(*operands, causal=name in ("gpt2-zinc", "llama")) * direction).sum()

    for parameter, gradient in zip(wanted, torch.autograd.grad(loss(), wanted), strict=True):
        step = 1e-6 * noise(*parameter.shape)
        ends = []
        with torch.no_grad():
            for sign in (1.0, -1.0):
                parameter.add_(sign * step)
                ends.append(float(loss()))
                parameter.sub_(sign * step)
        assert (ends[0] - ends[1]) / 2.0 == pytest.approx(float((gradient * step).sum()), rel=1e-4, abs=1e-9)


@each
@torch.no_grad()
def test_compiled_is_eager(name: str, shifted: Any, batch: Any) -> None:
    model, inputs = shifted(name), doubled(batch(name, 2, 20))
    expected = output(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(compiled, inputs), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@each
@torch.no_grad()
def test_lower_precision_stays_close(name: str, dtype: torch.dtype, shifted: Any, batch: Any) -> None:
    model, inputs = shifted(name), doubled(batch(name, 2, 20))
    expected = output(model, inputs)
    model.float().to(dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    cosine = torch.cosine_similarity(output(model, inputs).double(), expected, dim=-1).min()
    assert cosine > (0.995 if dtype == torch.bfloat16 else 0.999999)
