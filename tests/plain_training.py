"""What a training that knows nothing of polynomials does to a calibrated model, beside the same with them frozen.

    python tests/plain_training.py --write      # all of it, ten minutes → benchmarks/plain_training.json
    python tests/plain_training.py llama poly6-l1

AdamW on all parameters alike, without weight decay, gradients clipped to norm 1, as `Trainer` does by default. Each
figure is the mean negative log-likelihood of a token of held-out data, and the largest gradient norm of the polynomials
over that of the projections of attention. The control takes the same steps in the coefficients of powers of t.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import quality
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_polyattn as hp
from hf_polyattn.patching.patched import patched_layers
from hf_polyattn.patching.relative import RelativePolynomial

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "plain_training.json"
SPECS = ("poly3", "poly3-mean", "poly3-none", "poly4-l1", "poly6-l1", "poly3^16-l1", "poly3~1", "poly4~1-l1")
STEPS, RATES = 20, (2e-5, 1e-4)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "attn.c_proj", "attn.out_proj")

CHECKPOINTS = quality.SHARED / "checkpoints"
# With few rows a step and little held out: both arms see the same.
CASES: dict[str, Callable[[], quality.Case]] = {
    "llama": lambda: quality.stories(CHECKPOINTS / "llama-stories260K", start=1, count=16, size=1, held_out=8),
    "gpt2-zinc": lambda: quality.molecules(CHECKPOINTS / "gpt2-zinc-0.5m", held_out=128, size=16),
    "gpt2-tinystories": lambda: quality.stories(
        CHECKPOINTS / "gpt2-tinystories-3m", start=0, count=16, size=1, held_out=8
    ),
}


def calibrated(case: quality.Case, spec: str) -> PreTrainedModel:
    """Returns a patched and calibrated copy of a checkpoint."""
    model = hp.patch_model(copy.deepcopy(case.model), spec)
    hp.calibrate(model, case.batches[:4], progress=False)
    return model


def train(model: PreTrainedModel, batches: list[dict[str, Tensor]], lr: float) -> float:
    """Trains all parameters alike; returns the most that the polynomials' gradient was, over the projections'."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    polynomials = [parameter for name, parameter in trained.items() if ".polyattn." in name]
    projections = [p for name, p in trained.items() if any(f".{part}." in name for part in PROJECTIONS)]
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=0.0)
    steepest = 0.0
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        if polynomials:
            steepest = max(steepest, norm(polynomials) / norm(projections))
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return steepest


def norm(parameters: list[torch.nn.Parameter]) -> float:
    """Returns the norm of all their gradients."""
    return float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy whose polynomials do not train."""
    model = copy.deepcopy(model)
    for _, layer in patched_layers(model):
        layer.requires_grad_(False)
    return model


@torch.no_grad()
def in_powers(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy whose steps are in the coefficients of powers of t, in units of their own."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, RelativePolynomial):
            module.directions.copy_(torch.eye(module.directions.shape[-1]))
    return model


def study(case: quality.Case, spec: str) -> Iterator[dict[str, dict[str, float]]]:
    """Yields the figures of each arm so far, by arm and rate."""
    start = calibrated(case, spec)
    table: dict[str, Any] = {"calibrated": case.measure(start)["nll"]}
    for lr in RATES:
        for arm, model in {"trained": copy.deepcopy, "frozen": frozen, "in powers of t": in_powers}.items():
            student = model(start)
            steepest = train(student, case.batches, lr)
            table.setdefault(f"{lr:g}", {})[arm] = {**case.measure(student), "gradient": steepest}
        yield table


def main() -> None:
    names, specs, writes = quality.asked(__doc__, CASES, SPECS, RESULTS)
    about = {
        "device": {"type": "cpu", "machine": platform.machine(), "threads": torch.get_num_threads()},
        "budget": {"steps": STEPS, "learning_rates": RATES},
    }
    for name in names:
        case = CASES[name]()
        tables = quality.read(RESULTS).get(name, {}) if writes else {}
        for spec in specs:
            tables[spec] = [*study(case, spec)][-1]
            print(name, spec, tables[spec], flush=True)
            if writes:
                quality.write(RESULTS, "python tests/plain_training.py --write", name, tables, **about)


if __name__ == "__main__":
    main()
