"""The sweep: patches a tiny model of every family of Transformers and compares it with an oracle.

The oracle is the softmax model itself, run with its attention function replaced by a few lines that compute
x³/√n in float64. It shares nothing with `hf_polyattn`, neither the operator nor the masks nor the search for
attention modules. What each family must do is in family_checks.py. Writes benchmarks/sweep.json:

    python tests/sweep.py --write          # all families, some minutes
    python tests/sweep.py bert llava       # these, printed; with --write their rows are replaced
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from family_checks import SPEC, Row, WrongModelError, check
from oracle import SoftmaxAudit
from tiny_models import CONFIG_MAPPING, Inputs, UnavailableError, candidate_inputs, tiny_model
from tiny_runs import class_names, name_of, run, trace
from transformers import PreTrainedModel

import hf_polyattn as hp

TABLE = Path(__file__).resolve().parents[1] / "benchmarks" / "sweep.json"
SECONDS_PER_FAMILY = 120


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
