"""The lines of a script that do what was done on the page, as it was done, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration on the page.

    Attributes:
        spec: that was calibrated.
        examples: texts or images that it saw.
        call: expression that reads them again, in terms of `processor`; "" if they were given on the page.
        size: examples in a batch.
        length: tokens that a text was cut to.
    """

    spec: str
    examples: Sequence[Any]
    call: str
    size: int
    length: int


def script(
    model: Any, name: str, processor: Any, *, polynomial: bool, calibration: Calibration | None, folder: str
) -> str:
    """Returns Python code that loads a model, calibrates it as the page did, and saves it with its processor.

    Pictures that were given on the page are arguments of the script; all else is in it.

    Args:
        model: as it is now.
        name: folder or Hub id that it was loaded from.
        processor: its tokenizer or image processor.
        polynomial: whether it was polynomial when it was loaded.
        calibration: the last one on the page; None if there was none.
        folder: to save to.
    """
    text = isinstance(processor, PreTrainedTokenizerBase)
    kind, processor_kind = type(model).__name__, "AutoTokenizer" if text else "AutoImageProcessor"
    device = "" if model.device.type == "cpu" else f'.to("{model.device.type}")'
    lines = [
        f"model = {kind}.from_pretrained({_quoted(name)}){device}.eval()",
        f"processor = {processor_kind}.from_pretrained({_quoted(name)})",
    ]
    imports = [f"from transformers import {', '.join(sorted((kind, processor_kind)))}"]
    saving = [f"model.save_pretrained({_quoted(folder)})", f"processor.save_pretrained({_quoted(folder)})"]
    if calibration is None:
        imports.insert(0, "import hf_polyattn  # before a polynomial model is loaded")
        said = "# As it was loaded: nothing was calibrated on the page."
        if not polynomial:
            said, saving = "# Still softmax: Calibrate, and the lines that do it stand here.", []
        return "\n".join([*imports, "", *lines, said, *saving, ""])
    return "\n".join(
        [*_imports(calibration), *imports, "", *lines, *_calibrating(calibration, polynomial), *saving, ""]
    )


def _imports(calibration: Calibration) -> list[str]:
    names = sorted(filter(None, ("encode", calibration.call.partition("(")[0])))
    lines = ["import hf_polyattn as hp", f"from hf_polyattn.examples import {', '.join(names)}"]
    return ["import sys", "", *lines, "from PIL import Image"] if _given_pictures(calibration) else lines


def _calibrating(calibration: Calibration, polynomial: bool) -> list[str]:
    examples, spec = calibration.examples, calibration.spec
    if calibration.call:
        read = [f"examples = {calibration.call}[:{len(examples)}]"]
    elif _given_pictures(calibration):
        read = [
            f"examples = [Image.open(path) for path in sys.argv[1:]]  # the first {len(examples)} of those on the page"
        ]
    else:
        read = ["examples = [", *(f"    {_quoted(one)}," for one in examples), "]"]
    batches = f"encode(processor, examples, {calibration.size}, {calibration.length})"
    if polynomial:
        turn = [f"hp.calibrate(model, {batches}, spec={_quoted(spec)}, max_batches=None)"]
    else:
        turn = [f"hp.patch_model(model, {_quoted(spec)})", f"hp.calibrate(model, {batches}, max_batches=None)"]
    return [*read, *turn]


def _quoted(text: str) -> str:
    """Returns a text as Python writes it, between double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _given_pictures(calibration: Calibration) -> bool:
    return not calibration.call and not isinstance(calibration.examples[0], str)
