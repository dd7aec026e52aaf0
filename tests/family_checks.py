"""What a family of Transformers that is patched must do: the checks of the sweep."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from oracle import Oracle, SoftmaxAudit
from tiny_models import Inputs, UnavailableError, text_inputs
from tiny_runs import class_names, difference, name_of, run, trace, with_and_without_mask
from torch import nn
from transformers import PreTrainedModel

import hf_polyattn as hp

SPEC = "poly3"

# A float32 part in a float64 model (norms, rotary tables) rounds at 6e-8; what the tests look for is of order 1.
ROUNDING = 1e-5
DIFFERS = 1e-2

# Softmax that is not attention: experts' routers, residual streams, a tokenizer of images, entropies, keypoints; and
# Sam2MultiScaleAttention, which computes one over its heads and drops it.
_OTHER_SOFTMAX = re.compile(
    r"Router|Gat(e|ing)$|HyperConnection|Ovis2VisionModel|BltPatcher|InterestPointDecoder|Sam2MultiScaleAttention"
)

# Cross-attention whose two sequences happen to have one length here.
_EQUAL_LENGTHS = {"LightGlueAttention", "Sam3Attention", "Sam3LiteTextAttention"}

# Self-attention whose keys are pooled, or the queries, or which sees another sequence beside its own.
_OTHER_LENGTHS = {
    "Idefics2PerceiverAttention",
    "Kosmos2_5TextAttention",
    "KosmosTextAttention",
    "PvtSelfAttention",
    "Sam2MultiScaleAttention",
    "SegformerAttention",
    "T5Gemma2MergedAttention",
}


class WrongModelError(Exception):
    """A family that is patched without complaint and does not do what it should."""


@dataclass(frozen=True)
class Row:
    """What the sweep saw of one family.

    Attributes:
        family: its `model_type`.
        status: passed, refused (by an error that says why), skipped (not built or not run here) or failed.
        reason: of any status but passed.
        model: the class.
        inputs: the arguments that the model ran with.
        dtype: float64, or float32 where the model does not run in float64.
        patched: polynomial modules.
        reached: how many of them these inputs reach.
        polynomial: their classes.
        softmax: classes of attention that stay softmax on purpose: cross-attention.
        error: largest difference to the oracle, relative to its largest output; one digit.
        tolerance: four times what rounding the oracle's attention to float32 changes; one digit.
        control: the same difference between the softmax model and the oracle; two digits.
        padding: by side, whether padded rows equal unpadded ones, in the patched model and in the softmax model.
        cross_attention: whether the family also passes with cross_attention=True; None without cross-attention.
        excluded: of a refused family, the classes that it passes without (patch_model(..., exclude=...)).
        rest: whether it does.
    """

    family: str
    status: str
    reason: str = ""
    model: str = ""
    inputs: tuple[str, ...] = ()
    dtype: str = ""
    patched: int = 0
    reached: int = 0
    polynomial: tuple[str, ...] = ()
    softmax: tuple[str, ...] = ()
    error: float = 0.0
    tolerance: float = 0.0
    control: float = 0.0
    padding: dict[str, str] = field(default_factory=dict)
    cross_attention: str | None = None
    excluded: tuple[str, ...] = ()
    rest: str | None = None


def check(row: Row, model: PreTrainedModel, inputs: Inputs, **options: Any) -> Row:
    """Returns the row of a family that passes: it equals the oracle, leaves no softmax behind and can be undone.

    Raises:
        PolyAttnError: it is refused; the model is left as it was.
        WrongModelError: it is patched and wrong.
        UnavailableError: no output depends on its attention.
    """
    before = trace(model, inputs)
    variants = with_and_without_mask(model, inputs)
    hp.patch_model(model, SPEC, **options)
    try:
        modules = dict(model.named_modules())
        status = {modules[path]: status for path, *_, status in hp.describe(model).rows}
        layers = {module: module.polyattn for module, text in status.items() if text == "patched"}
        with SoftmaxAudit() as audit:
            outputs = [run(model, variant) for variant in variants]
    finally:
        hp.unpatch_model(model)

    problems = [] if trace(model, inputs) == before else ["unpatch_model does not restore it"]
    change = difference(run(reloaded(model, options), inputs), outputs[0])
    if not change < ROUNDING:
        problems.append(f"saved and reloaded it differs by {change:.0e}")
    silent = {m for m in audit.found if status.get(m, "patched") == "patched" and not _OTHER_SOFTMAX.search(name_of(m))}
    if silent:
        problems.append(f"softmax is left in {', '.join(class_names(silent))}")

    for variant, output in zip(variants, outputs, strict=True):
        with Oracle(set(layers)).installed() as oracle:
            expected = run(model, variant)
        with Oracle(set(layers), noise=2.0**-24).installed():
            tolerance = 4.0 * difference(run(model, variant), expected)
        error, control = difference(output, expected), difference(run(model, variant), expected)
        if control == 0.0:
            raise UnavailableError("no output depends on its attention")
        if not error <= tolerance:
            problems.append(f"it differs from the oracle by {error:.0e}, tolerance {tolerance:.0e}")
        if not control > DIFFERS:
            problems.append(f"it differs from softmax by {control:.0e} only")
        problems += wrong_modules(oracle, status, layers, options.get("cross_attention", False))
    padding = {side: compare_padding(model, side, options) for side in ("left", "right")}
    problems += [f"{side} padding changes it" for side, verdict in padding.items() if verdict == "differs"]
    if problems:
        raise WrongModelError("; ".join(dict.fromkeys(problems)))
    return replace(
        row,
        status="passed",
        reason="",
        patched=len(layers),
        reached=sum(module in oracle.queries for module in layers),
        polynomial=class_names(layers),
        softmax=class_names(module for module, text in status.items() if text != "patched"),
        error=float(f"{error:.0e}"),
        tolerance=float(f"{tolerance:.0e}"),
        control=float(f"{control:.1e}"),
        padding={side: verdict for side, verdict in padding.items() if verdict},
    )


def wrong_modules(
    oracle: Oracle, status: dict[nn.Module, str], layers: dict[nn.Module, Any], cross_attention: bool
) -> Iterator[str]:
    """Yields what the patch got wrong about the attention modules that really ran."""
    for module, (_, heads, length, head_dim) in oracle.queries.items():
        name, lengths = name_of(module), (length, oracle.key_lengths[module])
        if module not in status:
            yield f"{name} was not found"
        elif module in layers:
            if (layers[module].heads, layers[module].head_dim) != (heads, head_dim):
                yield f"{name} has {heads} heads of {head_dim}, not {layers[module]}"
            if lengths[0] != lengths[1] and not cross_attention and name not in _OTHER_LENGTHS:
                yield f"{name} is patched as self-attention, with lengths {lengths}"
        elif "cross" in status[module] and lengths[0] == lengths[1] and name not in _EQUAL_LENGTHS:
            yield f"{name} is left softmax as cross-attention, with lengths {lengths}"


def compare_padding(model: PreTrainedModel, side: str, options: dict[str, Any]) -> str:
    """Returns whether a padded row of text equals the same row alone, "" where there is no such text.

    equal; differs; or "softmax differs" where it does not in the softmax model either (learned positions of an
    encoder, say).
    """
    names = inspect.signature(model.forward).parameters
    padded = {name: value for name, value in text_inputs(model, side).items() if name in names}
    if not {"input_ids", "attention_mask"} <= padded.keys():
        return ""
    valid = padded["attention_mask"][1].bool()
    if "position_ids" in names:
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    alone = {name: x[1:] if name.startswith("decoder") else x[1:, valid] for name, x in padded.items()}

    def gap() -> float:
        row, expected = (next(iter(run(model, inputs).values())) for inputs in (padded, alone))
        row = row[1:]
        if row.dim() > 2 and row.shape[1] == len(valid):
            row = row[:, valid]
        return difference({"": row}, {"": expected})

    try:
        softmax = gap()
    except Exception:  # this model wants more than text, or cannot do with positions given
        return ""
    if not softmax < ROUNDING:
        return "softmax differs"
    hp.patch_model(model, SPEC, **options)
    try:
        return "equal" if gap() < ROUNDING else "differs"
    finally:
        hp.unpatch_model(model)


def reloaded(model: PreTrainedModel, options: dict[str, Any]) -> PreTrainedModel:
    """Returns the model patched, saved and loaded again; the model itself is not left patched."""
    hp.patch_model(model, SPEC, **options)
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder, dtype=model.dtype, experts_implementation="eager")
    finally:
        hp.unpatch_model(model)
    return loaded.eval()
