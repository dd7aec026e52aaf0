"""What calibration keeps at other lengths than those of its data: MiniLM on texts of 32, 128 and 512 tokens.

    python tests/lengths.py --write      # → benchmarks/lengths.json
    python tests/lengths.py "16–128" poly3~1

Blocks of wikitext, [CLS] … [SEP]. The measure is the cosine of the mean hidden state to softmax's, on held-out text.
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from quality import RESULTS, asked, column, embedded_minilm, write
from torch import Tensor

import hf_polyattn as hp

SPECS = ("poly3", "poly3~1", "poly4-l1", "poly6-l1", "poly3^16-l1")
MEASURED = (32, 128, 512)
FILE = RESULTS.with_name("lengths.json")
_BATCH = 2048  # tokens


@dataclass(frozen=True)
class Data:
    """Tokens of a text in each block, and whether `calibrate` may crop them."""

    lengths: tuple[int, ...]
    crop: bool | None = False
    batches: int = 2  # of each length


DATA = {
    "16–512": Data((16, 32, 64, 128, 256, 512)),
    "16–128": Data((16, 32, 64, 128)),
    "512, cropped": Data((512,), crop=None, batches=4),
    "512": Data((512,), batches=4),
}


@cache
def tokens(split: str, count: int) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded_minilm())
    found: list[int] = []
    for text in column(f"wikitext2/{split}.parquet", "text", 10**6):
        found += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"wikitext2/{split} has {len(found)} tokens, {count} are needed")


def blocks(split: str, length: int, count: int, start: int = 0) -> dict[str, Tensor]:
    """Returns `count` texts of `length` tokens, [CLS] and [SEP] among them, from a place in a split."""
    size = length - 2
    text = torch.tensor(tokens(split, start + count * size)[start:]).view(count, size)
    first, last = torch.full((count, 1), 101), torch.full((count, 1), 102)
    ids = torch.cat([first, text, last], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def calibration_batches(data: Data) -> list[dict[str, Tensor]]:
    found, start = [], 0
    for length in data.lengths:
        for _ in range(data.batches):
            found.append(blocks("validation", length, _BATCH // length, start))
            start += _BATCH
    return found


@torch.no_grad()
def embeddings(model: Any, length: int) -> Tensor:
    hidden: Tensor = model(**blocks("test", length, max(8, 4096 // length))).last_hidden_state
    return torch.nn.functional.normalize(hidden.mean(1), dim=-1)


def measured(model: Any, spec: str, data: Data) -> dict[str, Any]:
    """Returns the cosines of the calibrated model and at which lengths it warned; the model is restored."""
    softmax = {length: embeddings(model, length) for length in MEASURED}
    hp.patch_model(model, spec)
    try:
        report = hp.calibrate(model, calibration_batches(data), max_batches=None, crop=data.crop, progress=False)
        found: dict[str, Any] = {"rows": report.rows, "keys": report.lengths, "cosine": {}, "warned": []}
        for length in MEASURED:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                cosine = (embeddings(model, length) * softmax[length]).sum(-1).mean()
            found["cosine"][str(length)] = float(cosine)
            found["warned"] += [length] if any("calibrated on rows" in str(w.message) for w in caught) else []
        return found
    finally:
        hp.unpatch_model(model)


def main() -> None:
    names, specs, writes = asked(__doc__, DATA, SPECS, FILE)
    model = transformers.AutoModel.from_pretrained(embedded_minilm()).eval()
    for name in names:
        table = {}
        for spec in specs:
            started = time.perf_counter()
            table[spec] = measured(model, spec, DATA[name])
            print(name, spec, table[spec], f"{time.perf_counter() - started:.0f} s", flush=True)
        if writes:
            write(FILE, "python tests/lengths.py --write", f"minilm, calibrated on {name} tokens", table)


if __name__ == "__main__":
    sys.exit(main())
