"""Distillation, on real checkpoints: the student comes closer to its softmax teacher, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from hf_polyattn import (
    InputError,
    PatchError,
    PolyAttentionConfig,
    calibrate,
    patch_model,
    softmax_attention,
    unpatch_model,
)
from hf_polyattn.adaptation.distillation import distill, divergence_from
from hf_polyattn.adaptation.training import _learning_rate, param_groups
from hf_polyattn.errors import TrainingError
from hf_polyattn.patching.core import PolyAttention

Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def softmax(checkpoint: Callable[[str], Path]) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint("llama")).eval()


@pytest.fixture
def student(softmax: PreTrainedModel) -> PreTrainedModel:
    return patch_model(copy.deepcopy(softmax), "poly2-l1")


@pytest.fixture(scope="module")
def batches(softmax: PreTrainedModel) -> list[Batch]:
    """Stories that the checkpoint itself tells, the second half of each batch padded on the right."""
    torch.manual_seed(0)
    start = torch.ones(16, 1, dtype=torch.long)
    stories = softmax.generate(start, attention_mask=start, do_sample=True, min_new_tokens=40, max_new_tokens=40)
    mask = torch.ones_like(stories)
    mask[::2, 25:] = 0
    return [{"input_ids": stories[i : i + 4], "attention_mask": mask[i : i + 4]} for i in range(0, 16, 4)]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def disagreement(model: PreTrainedModel, softmax: PreTrainedModel, batch: Batch) -> float:
    """Returns the mean total variation of the predicted next tokens, where the batch is not padding."""
    with torch.no_grad():
        ours, theirs = (m(**batch).logits.softmax(-1)[batch["attention_mask"].bool()] for m in (model, softmax))
    return 0.5 * (ours - theirs).abs().sum(-1).mean().item()


@pytest.mark.parametrize("kind", ["accelerator", "the caller's autocast"])
def test_mixed_precision_trains_the_weights_that_it_computes_with(
    student: PreTrainedModel, softmax: PreTrainedModel, batches: list[Batch], kind: str
) -> None:
    twin, before = copy.deepcopy(student), disagreement(student, softmax, batches[3])
    options: dict[str, Any] = {"steps": 30, "lr": 1e-3, "coefficient_lr": 1e-4, "progress": False}
    distill(twin, batches[:3], **options)
    if kind == "accelerator":
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            accelerator = Accelerator(cpu=True, mixed_precision="bf16")
            distill(student, batches[:3], accelerator=accelerator, **options)
            student = accelerator.unwrap_model(student, keep_fp32_wrapper=False)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            distill(student, batches[:3], **options)
    after = [disagreement(model, softmax, batches[3]) for model in (twin, student)]
    assert after[0] < 0.8 * before
    assert after[1] == pytest.approx(after[0], rel=0.1)


def test_student_comes_closer_to_its_teacher_on_unseen_text(
    student: PreTrainedModel, softmax: PreTrainedModel, batches: list[Batch]
) -> None:
    before = disagreement(student, softmax, batches[0])
    still = copy.deepcopy(student)
    report = distill(student, batches[1:], steps=20, lr=1e-3, coefficient_lr=1e-2, progress=False)
    distill(still, batches[1:], steps=20, lr=0.0, progress=False)
    after = disagreement(student, softmax, batches[0])
    assert after < before == disagreement(still, softmax, batches[0])
    assert len(report.losses) == len(report.gradient_norms) == 20
    assert report.losses[-1] < 0.8 * report.losses[0]
    assert "20 steps" in str(report)


def test_copied_teacher_is_the_softmax_model(
    student: PreTrainedModel, softmax: PreTrainedModel, batches: list[Batch]
) -> None:
    other = copy.deepcopy(softmax)
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    given = {"copied": None, "softmax": softmax, "other": other}
    losses = {
        name: distill(copy.deepcopy(student), batches, steps=1, teacher=teacher, progress=False).losses
        for name, teacher in given.items()
    }
    assert losses["copied"] == losses["softmax"]
    assert losses["copied"] != losses["other"]


def test_student_that_equals_its_teacher_has_no_loss(softmax: PreTrainedModel, batches: list[Batch]) -> None:
    student = patch_model(copy.deepcopy(softmax), "poly2-l1")
    with softmax_attention(student), torch.no_grad():
        assert divergence_from(softmax.eval(), student.eval(), batches[0]) < 1e-9
        with pytest.raises(PatchError, match=r"inside of softmax_attention\(model\)"):
            distill(student, batches, steps=1, lr=0.0, progress=False)
    assert distill(student, batches, steps=1, lr=0.0, progress=False).losses[0] > 0.1


def test_padding_is_left_out_of_the_loss(student: PreTrainedModel, batches: list[Batch]) -> None:
    hidden = batches[0]["attention_mask"] == 0
    other_padding = {**batches[0], "input_ids": batches[0]["input_ids"].masked_fill(hidden, 77)}
    unmasked = {name: tensor for name, tensor in batches[0].items() if name != "attention_mask"}
    loss, same, different = (
        distill(copy.deepcopy(student), [batch], steps=1, progress=False).losses[0]
        for batch in (batches[0], other_padding, unmasked)
    )
    assert same == pytest.approx(loss, rel=1e-5)
    assert different != pytest.approx(loss, rel=1e-2)


def test_models_without_a_mask_are_matched_too(checkpoint: Callable[[str], Path]) -> None:
    model = AutoModelForImageClassification.from_pretrained(checkpoint("vit"))
    torch.manual_seed(0)
    pixels = torch.nn.functional.interpolate(torch.randn(2, 3, 14, 14), size=(224, 224), mode="bicubic")
    patch_model(model, "poly2-l1", layers=[11])
    losses = distill(model, [{"pixel_values": pixels}], steps=4, lr=1e-5, progress=False).losses
    assert losses[-1] < losses[0]


def test_overflow_raises_and_keeps_the_last_good_weights(student: PreTrainedModel, batches: list[Batch]) -> None:
    before = weights(student)
    with pytest.raises(TrainingError, match=r"step 2: the loss is (nan|inf).*lower lr \(now up to 1e\+30\)"):
        distill(student, batches, steps=4, lr=1e30, warmup=0.0, progress=False)
    after = weights(student)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_good_weights_are_the_trained_ones(student: PreTrainedModel, batches: list[Batch]) -> None:
    before = weights(student)
    bad = {**batches[1], "attention_mask": None, "input_ids": None}
    bad["inputs_embeds"] = torch.full((1, 4, 64), torch.nan)
    with pytest.raises(TrainingError, match="step 3: the loss is nan"):
        distill(student, [batches[0], batches[1], bad], steps=9, progress=False)
    after = weights(student)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_train_and_eval_modes_are_restored(student: PreTrainedModel, batches: list[Batch]) -> None:
    teacher = unpatch_model(copy.deepcopy(student)).train()
    student.train()
    student.lm_head.eval()
    modes = [module.training for module in (*student.modules(), *teacher.modules())]
    distill(student, batches, steps=1, teacher=teacher, progress=False)
    assert [module.training for module in (*student.modules(), *teacher.modules())] == modes
    assert len(set(modes)) == 2


def test_batches_are_gone_through_again(student: PreTrainedModel, batches: list[Batch]) -> None:
    losses = distill(copy.deepcopy(student), batches[:2], steps=5, lr=0.0, progress=False).losses
    assert losses[0] == losses[2] == losses[4] != losses[1] == losses[3]
    with pytest.raises(InputError, match="used up"):
        distill(student, iter(batches[:2]), steps=5, lr=0.0, progress=False)


def test_gradients_are_clipped(student: PreTrainedModel, batches: list[Batch]) -> None:
    """Adam's update of a gradient far below its epsilon of 1e-8 is far below lr."""
    moved = []
    for limit in (1e-11, 1.0):
        model = copy.deepcopy(student)
        before = weights(model)
        report = distill(model, batches, steps=1, lr=1e-3, max_grad_norm=limit, progress=False)
        moved.append(max((tensor - before[name]).abs().max().item() for name, tensor in weights(model).items()))
        assert report.gradient_norms[0] > 1e-3
    assert moved[0] < 1e-5 < 5e-4 < moved[1]


def test_frozen_polynomials_stay(softmax: PreTrainedModel, batches: list[Batch]) -> None:
    model = patch_model(copy.deepcopy(softmax), PolyAttentionConfig("poly2-l1", learnable=False))
    before = weights(model)
    distill(model, batches, steps=1, progress=False)
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not any("polyattn" in name for name in changed)


def test_the_row_shift_trains_with_the_model(softmax: PreTrainedModel, batches: list[Batch]) -> None:
    model = patch_model(copy.deepcopy(softmax), "poly3~1")
    calibrate(model, batches, row_shift="moments", squares=2, progress=False)
    before = weights(model)
    distill(model, batches, steps=2, lr=0.0, coefficient_lr=1e-3, progress=False)
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    own = "delta", "center", "key_shift", "moments.weights", "moments.length_shift", "moments.squares"
    trained = *own, "refinements.0.delta", "refinements.0.steps"  # not what calibration alone sets
    assert changed == {f"model.layers.{n}.self_attn.polyattn.{name}" for n in range(5) for name in trained}


def test_accelerator_trains_as_without(student: PreTrainedModel, batches: list[Batch]) -> None:
    alone = copy.deepcopy(student)
    plain = distill(alone, batches, steps=3, progress=False)
    accelerated = distill(student, batches, steps=3, accelerator=Accelerator(cpu=True), progress=False)
    assert accelerated == plain
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), alone.parameters(), strict=True))


def test_accelerator_with_accumulation_is_refused(student: PreTrainedModel, batches: list[Batch]) -> None:
    class Accumulating:
        gradient_accumulation_steps = 4

    with pytest.raises(InputError, match="gradient_accumulation_steps=1"):
        distill(student, batches, steps=1, accelerator=Accumulating(), progress=False)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(lambda student, softmax: {"model": softmax}, PatchError, "is not patched", id="softmax-student"),
        pytest.param(lambda student, softmax: {"teacher": student}, PatchError, "teacher is", id="patched-teacher"),
        pytest.param(lambda student, softmax: {"steps": 0}, InputError, "at least 1, got 0", id="no-steps"),
        pytest.param(lambda student, softmax: {"batches": []}, InputError, "batches is empty", id="no-batches"),
    ],
)
def test_wrong_input_is_named(
    make: Callable[..., dict[str, Any]],
    error: type[Exception],
    message: str,
    student: PreTrainedModel,
    softmax: PreTrainedModel,
    batches: list[Batch],
) -> None:
    arguments = {"model": student, "batches": batches, "steps": 1, "progress": False, **make(student, softmax)}
    with pytest.raises(error, match=message):
        distill(arguments.pop("model"), arguments.pop("batches"), **arguments)


def test_param_groups_hold_every_trained_parameter_once(student: PreTrainedModel) -> None:
    student.model.embed_tokens.weight.requires_grad_(False)
    groups = param_groups(student, 1e-4, coefficient_lr=1e-2, weight_decay=0.1)
    grouped = [parameter for group in groups for parameter in group["params"]]
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    assert len(grouped) == len(trained) < len(list(student.parameters()))
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in trained}


def test_param_groups_decay_matrices_only(student: PreTrainedModel) -> None:
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    settings = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in param_groups(student, 1e-4, coefficient_lr=1e-2, weight_decay=0.1)
        for parameter in group["params"]
    }
    assert settings["model.layers.0.self_attn.polyattn.delta"] == (1e-2, 0.0)
    assert settings["model.layers.0.self_attn.q_proj.weight"] == (1e-4, 0.1)
    assert settings["model.norm.weight"] == (1e-4, 0.0)


def test_param_groups_find_polynomials_inside_peft(student: PreTrainedModel) -> None:
    peft = get_peft_model(student, LoraConfig(target_modules=["q_proj"], modules_to_save=["polyattn"]))
    polynomial, *others = param_groups(peft, 1e-4, coefficient_lr=1e-2, weight_decay=0.1)
    modules = [module for module in peft.modules() if isinstance(module, PolyAttention)]
    trained = {id(tensor) for module in modules for tensor in module.parameters() if tensor.requires_grad}
    assert 0 < len(trained) < sum(len(list(module.parameters())) for module in modules)
    assert {id(parameter) for parameter in polynomial["params"]} == trained
    assert [group["weight_decay"] for group in (polynomial, *others)] == [0.0, 0.1]


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [_learning_rate(step, 20, 0.2) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[4] == 1.0
    assert 0.0 < rates[-1] < 0.02
