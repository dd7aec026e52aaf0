"""The sweep: patches a tiny model of every family of Transformers and compares it with an oracle.

The oracle is the softmax model itself, run with its attention function replaced by a few lines that compute
x³/√n in float64. It shares nothing with `hf_polyattn`, neither the operator nor the masks nor the search for
attention modules. Writes benchmarks/sweep.json:

    python tests/sweep.py --write          # all families, some minutes
    python tests/sweep.py bert llava       # these, printed; with --write their rows are replaced
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from oracle import Oracle, SoftmaxAudit
from tiny_models import CONFIG_MAPPING, Inputs, UnavailableError, candidate_inputs, text_inputs, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_polyattn as hp

TABLE = Path(__file__).resolve().parents[1] / "benchmarks" / "sweep.json"
SPEC = "poly3"
SECONDS_PER_FAMILY = 120

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

Outputs = dict[str, Tensor]


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


def sweep_family(family: str) -> Row:
    """Returns what patching does to a tiny model of a family."""
    row = Row(family, "skipped")
    try:
        model, inputs = runnable(family)
        row = replace(row, model=name_of(model), inputs=tuple(inputs), dtype=str(model.dtype).removeprefix("torch."))
        before = trace(model, inputs)
        row = check(row, model, inputs)
    except UnavailableError as reason:
        return replace(row, reason=str(reason))
    except WrongModelError as reason:
        return replace(row, status="failed", reason=str(reason))
    except hp.PolyAttnError as error:
        if trace(model, inputs) != before:
            return replace(row, status="failed", reason=f"refused, but not left as it was: {error}")
        return refused(replace(row, reason=str(error).split(", for example at")[0]), model, inputs)
    if row.softmax:
        row = replace(row, cross_attention=outcome(row, model, inputs, cross_attention=True))
    return row


def refused(row: Row, model: PreTrainedModel, inputs: Inputs) -> Row:
    """Returns the row of a refused family, with what becomes of it without the modules that cannot be patched."""
    sites = hp.describe(model).rows
    if not sites:
        with SoftmaxAudit() as audit:
            run(model, inputs)
        missed = [name for name in class_names(audit.found) if "attention" in name.lower()]
        if missed:
            return replace(row, status="failed", reason=f"{', '.join(missed)} was not found")
        return replace(row, reason="no softmax attention")
    stuck = [site for site in sites if site[-1] != "can be patched" and not site[-1].startswith("cross-attention")]
    if not 0 < len(stuck) < len(sites):
        return replace(row, status="refused")
    rest = outcome(row, model, inputs, exclude=[site[0] for site in stuck])
    excluded = tuple(sorted({site[1] for site in stuck})) if rest else ()
    return replace(row, status="refused", excluded=excluded, rest=rest)


def outcome(row: Row, model: PreTrainedModel, inputs: Inputs, **options: Any) -> str | None:
    """Returns what becomes of a check with other options: passed, or the error; None if nothing can be patched."""
    try:
        check(row, model, inputs, **options)
    except TimeoutError:
        raise
    except Exception as error:
        if "no module that can be patched" in str(error):
            return None
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "passed"


def runnable(family: str) -> tuple[PreTrainedModel, Inputs]:
    """Returns a tiny model and inputs that it runs with, in float64 if it can.

    Raises:
        UnavailableError: there is none.
    """
    errors: list[str] = []
    for dtype in (torch.float64, torch.float32):
        model = tiny_model(family, dtype)
        for inputs in candidate_inputs(model):
            inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
            try:
                outputs = run(model, inputs)
            except TimeoutError:
                raise
            except Exception as error:  # whatever a model says of inputs that do not fit
                errors.append(f"{type(error).__name__}: {error}".splitlines()[0][:200])
                continue
            if outputs:
                return model, inputs
    raise UnavailableError(f"no inputs found: {errors[0]}" if errors else "no inputs known for its arguments")


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


def with_and_without_mask(model: PreTrainedModel, inputs: Inputs) -> list[Inputs]:
    """Returns the inputs, and the inputs without their attention mask if the model can do without."""
    unmasked = {name: value for name, value in inputs.items() if name != "attention_mask"}
    if unmasked.keys() == inputs.keys():
        return [inputs]
    try:
        run(model, unmasked)
    except Exception:
        return [inputs]
    return [inputs, unmasked]


@torch.no_grad()
def run(model: PreTrainedModel, inputs: Inputs) -> Outputs:
    """Returns the float tensors that a model returns, by name."""
    torch.manual_seed(0)
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return dict(tensors(model(**inputs, **cache)))


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, f"{name}.{key}")


def difference(outputs: Outputs, expected: Outputs) -> float:
    """Returns the largest difference, relative to the largest value of its tensor; inf where shapes differ."""
    if {name: value.shape for name, value in outputs.items()} != {name: v.shape for name, v in expected.items()}:
        return math.inf
    largest = 0.0
    for name, value in expected.items():
        finite = value.isfinite()
        if not torch.equal(finite, outputs[name].isfinite()):
            return math.inf
        if finite.any():
            scale = value[finite].abs().max().clamp(min=1e-30)
            largest = max(largest, ((outputs[name] - value)[finite].abs().max() / scale).item())
    return largest


def trace(model: PreTrainedModel, inputs: Inputs) -> tuple[Any, ...]:
    """Returns all that a patch could change and `unpatch_model` must restore: config, weights' names, outputs."""
    outputs = {name: value.numpy().tobytes() for name, value in run(model, inputs).items()}
    return model.config.to_json_string(), list(model.state_dict()), outputs


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


def name_of(module: nn.Module) -> str:
    return type(module).__name__


def class_names(modules: Iterable[nn.Module]) -> tuple[str, ...]:
    return tuple(sorted({name_of(module) for module in modules}))


def sweep_in_time(family: str) -> Row:
    """Returns `sweep_family`, or why it ended otherwise."""
    quiet()
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(SECONDS_PER_FAMILY)
    try:
        return sweep_family(family)
    except TimeoutError:
        return Row(family, "skipped", f"takes more than {SECONDS_PER_FAMILY} s")
    except Exception as error:
        return Row(family, "failed", f"{type(error).__name__}: {error}".splitlines()[0])
    finally:
        signal.alarm(0)


def _out_of_time(*_: Any) -> None:
    raise TimeoutError


def quiet() -> None:
    """Silences what Transformers says while it builds, saves and loads hundreds of models."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def read_table() -> dict[str, Any]:
    """Returns benchmarks/sweep.json, its families by name."""
    table = json.loads(TABLE.read_text())
    return {**table, "families": {row["family"]: row for row in table["families"]}}


def as_json(row: Row) -> dict[str, Any]:
    """Returns a row as JSON types, fields at their defaults left out."""
    plain, defaults = (json.loads(json.dumps(asdict(each))) for each in (row, Row("", "")))
    return {name: value for name, value in plain.items() if value != defaults[name]}


def write_table(rows: Iterable[dict[str, Any]]) -> None:
    """Writes benchmarks/sweep.json, a line a family."""
    rows = sorted(rows, key=lambda row: row["family"])
    head = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "hf_polyattn": hp.__version__,
        "spec": SPEC,
        "device": "cpu",
        "counts": dict(sorted(Counter(row["status"] for row in rows).items())),
    }
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    text = json.dumps(head, indent=1).removesuffix("\n}")
    TABLE.write_text(f'{text},\n "families": [\n{lines}\n ]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types; all of them by default")
    parser.add_argument("--write", action="store_true", help="write benchmarks/sweep.json")
    options = parser.parse_args()
    families = options.families or sorted(CONFIG_MAPPING)
    rows = {}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(sweep_in_time, families):
            rows[row.family] = as_json(row)
            print(json.dumps(rows[row.family]), flush=True)
    print(dict(Counter(row["status"] for row in rows.values())))
    if options.write:
        write_table(({**read_table()["families"], **rows} if options.families else rows).values())


if __name__ == "__main__":
    main()
