"""Arms measured side by side among parties: attention of one layer, and the whole model."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hf_polyattn.errors import InputError, PolyAttnError

from .checkpoint import read_checkpoint
from .engine import PROTOCOLS, Cost, Engine
from .models import Model, for_length, load
from .ranges import check

# The largest vocabulary whose table is looked up among the parties: the product of one-hot rows with the 30,522 rows of
# BERT's takes longer than all the rest, in every arm alike, so that its runs begin with the embeddings, as secrets.
LOOKED_UP = 4096
PLAIN_ERROR = 1e-4  # of the largest number, between JAX and PyTorch in plain text


class PlainTextError(PolyAttnError):
    """The forward pass in JAX is not that of the model."""


class Prepared:
    """One arm that `preparing` saved, beside its outputs in plain text.

    Attributes:
        model: in JAX.
        plain: its own outputs of the samples, of PyTorch.
        softmax: softmax's.
    """

    def __init__(self, folder: Path, arm: str, fraction_bits: int) -> None:
        self.fraction_bits = fraction_bits
        place = folder / arm.replace(" ", "_")
        self.arm, self.model = arm, load(read_checkpoint(place))
        polynomial = [layer is not None for layer in self.model.checkpoint.polynomials]
        if arm != "softmax" and not all(polynomial):
            raise InputError(f"{place} is to be {arm}, but {polynomial.count(False)} of its layers are softmax")
        tokens = np.load(folder / "samples.npz")
        self.samples = [tokens[f"tokens{i}"][0] for i in range(len(tokens))]
        self.plain, self.softmax = (
            [np.load(where / "reference.npz")[f"output{i}"][0] for i in range(len(tokens))]
            for where in (place, folder / "softmax")
        )

    def inputs(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a sample's one-hot tokens, secret, and which keys its rows see, public."""
        tokens = self.samples[number]
        one_hot = np.zeros((len(tokens), self.model.vocabulary), np.float32)
        one_hot[np.arange(len(tokens)), tokens] = 1.0
        visible = np.ones((len(tokens), len(tokens)), np.float32)
        return one_hot, np.tril(visible) if self.model.checkpoint.causal else visible

    def of(self, number: int) -> Model:
        """Returns the model for a sample."""
        return for_length(self.model, len(self.samples[number]), self.fraction_bits)

    def check_plain(self, number: int) -> float:
        """Returns how far JAX is from PyTorch in plain text, over the largest number.

        Raises:
            PlainTextError: further than 1e-4.
        """
        one_hot, visible = self.inputs(number)
        model = self.of(number)
        found = np.asarray(model.forward(model.weights, one_hot, visible))
        error = float(np.abs(found - self.plain[number]).max() / np.abs(self.plain[number]).max())
        if error > PLAIN_ERROR:
            raise PlainTextError(
                f"{self.arm}: JAX and PyTorch differ by {error:.2g} in plain text, over {PLAIN_ERROR:g}"
            )
        return error

    def operands(self, number: int, layer: int) -> list[np.ndarray]:
        """Returns query, key and value of a layer, (T, H · D) each, in plain text."""
        seen: list[Any] = []
        model = self.of(number)
        model.forward(model.weights, *self.inputs(number), seen)
        return [np.asarray(x) for x in seen[layer]]


def attention_program(model: Model, visible: np.ndarray, layer: int) -> Callable[..., Any]:
    """Returns the attention of one layer as a program of its secrets, query, key and value."""

    def run(weights: Any, query: Any, key: Any, value: Any) -> Any:
        return model.attend(layer, weights, query, key, value, visible)

    return run


def whole_program(model: Model, tokens: np.ndarray, visible: np.ndarray) -> tuple[Any, ...]:
    """Returns the model as a program, and its secrets: weights, and one-hot tokens or, see `LOOKED_UP`, embeddings."""
    if model.vocabulary <= LOOKED_UP:
        return (lambda weights, tokens: model.forward(weights, tokens, visible)), model.weights, tokens
    weights = {name: x for name, x in model.weights.items() if name != model.word_embeddings}
    embeddings = np.asarray(model.embed(model.weights, tokens))
    return (lambda weights, hidden: model.after_embedding(weights, hidden, visible)), weights, embeddings


# Measured beside softmax's attention: a softmax that divides every weight, and no activation at all, which is the limit
# of what any activation can gain.
BESIDE = {"jax.nn.softmax": "jax.nn.softmax", "products alone": "products"}


def of_kind(model: Model, kind: str) -> Model:
    """Returns a softmax model whose layers are of another kind of `owner.Plan`."""
    layers = [replace(layer, plan=replace(layer.plan, kind=kind)) for layer in model.layers]
    return replace(model, layers=layers)


def cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    """Returns the cosine of the means over tokens of two hidden states (T, F)."""
    found, wanted = found.astype(np.float64).mean(0), wanted.astype(np.float64).mean(0)
    return float(found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted))


def nll(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Returns the mean negative log-likelihood of the tokens after the first."""
    rows = logits[:-1].astype(np.float64)
    rows = rows - rows.max(-1, keepdims=True)
    return float((np.log(np.exp(rows).sum(-1)) - rows[np.arange(len(rows)), tokens[1:]]).mean())


def summed_up(costs: list[Cost]) -> dict[str, Any]:
    """Returns repeats as JSON: medians, for ABY3's counts of messages differ by a few, and all of them."""
    names = ("seconds", "bytes_sent", "rounds")
    return {name: median(getattr(cost, name) for cost in costs) for name in names} | {
        "repeats": list(map(asdict, costs))
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to measure.

    Attributes:
        protocols: of `engine.PROTOCOLS`.
        repeats: of the attention of one layer; 0 leaves it out.
        whole_repeats: of the whole model; 0 leaves it out.
        whole_samples: how many of the samples the whole model is run on; None for all.
        tokens: lengths of the samples that are run; None for all.
        field, fraction_bits: of the fixed-point numbers.
        layer: whose attention is run alone.
        loopback: protocols that are run as real processes too: attention of the first sample, each arm once.
    """

    protocols: Sequence[str]
    repeats: int = 3
    whole_repeats: int = 1
    whole_samples: int | None = None
    tokens: Sequence[int] | None = None
    field: str = "FM64"
    fraction_bits: int = 18
    layer: int = 0
    loopback: Sequence[str] = ()

    def jobs(self, numbers: Sequence[int]) -> list[Job]:
        """Returns what is run on samples of these numbers, in order: attention before the longer whole."""
        attention, whole = product(numbers, self.protocols), product(numbers[: self.whole_samples], self.protocols)
        jobs = [Job("attention", number, protocol, self.repeats) for number, protocol in attention]
        jobs += [Job("attention", numbers[0], protocol, 1, processes=True) for protocol in self.loopback]
        return jobs + [Job("whole", number, protocol, self.whole_repeats) for number, protocol in whole]


@dataclass(frozen=True, slots=True)
class Job:
    """Programs that are compared: a part of the model, `attention` or `whole`, on a sample, of each arm in turn."""

    part: str
    number: int
    protocol: str
    repeats: int
    processes: bool = False


def measure(
    folder: Path, arms: list[str], settings: Settings, save: Callable[[dict[str, Any]], None] = lambda results: None
) -> dict[str, Any]:
    """Returns costs and outputs of each arm, protocol and sample; arms take turns, so that all see the same machine.

    Args:
        folder: that `preparing` wrote.
        arms: to run, of those there.
        settings: how.
        save: takes the results so far, after each run.

    Raises:
        PlainTextError, RangeError, InputError: before anything is shared.
    """
    prepared = [Prepared(folder, arm, settings.fraction_bits) for arm in arms]
    lengths = [len(sample) for sample in prepared[0].samples]
    numbers = [n for n, length in enumerate(lengths) if settings.tokens is None or length in settings.tokens]
    if not numbers:
        raise InputError(f"no sample of {settings.tokens} tokens; there are {lengths}")
    plain_error = {arm.arm: max(arm.check_plain(number) for number in numbers) for arm in prepared}
    programs = {number: _programs(prepared, number, settings) for number in numbers}
    results: dict[str, Any] = {
        **{name: getattr(settings, name) for name in ("field", "fraction_bits", "layer")},
        "parties": PROTOCOLS,
        "prepared": json.loads((folder / "prepared.json").read_text()),
        "plain_error": plain_error,
        "whole_begins_with": "tokens" if prepared[0].model.vocabulary <= LOOKED_UP else "embeddings",
        "versions": {name: metadata.version(name) for name in ("spu", "jax", "numpy")}
        | {"python": platform.python_version()},
        "cores": os.cpu_count(),
        "threads_a_product": os.environ.get("OMP_THREAD_LIMIT"),
        "cases": [],
    }
    for job in settings.jobs(numbers):
        earlier = results["cases"]
        for cases in _cases(job, prepared, programs[job.number], settings):
            results["cases"] = earlier + cases
            save(results)
            print(json.dumps(cases[-1]), flush=True)
    return results


def _cases(
    job: Job, prepared: list[Prepared], programs: dict[str, Any], settings: Settings
) -> Iterator[list[dict[str, Any]]]:
    """Yields the cases of a job after each run; arms take turns, so that all see the same machine."""
    engine = Engine(job.protocol, settings.field, settings.fraction_bits, job.processes)
    arms = {arm.arm: arm for arm in prepared}
    costs: dict[str, list[Cost]] = {}
    outcomes: dict[str, dict[str, float]] = {}
    for name in [*programs[job.part]] * job.repeats:
        program, *inputs = programs[job.part][name]
        output, cost = engine.run(program, *inputs)
        costs.setdefault(name, []).append(cost)
        if name not in outcomes and job.part == "whole":
            outcomes[name] = _outcome(arms[name], job.number, output)
        elif name not in outcomes:
            outcomes[name] = {"error": programs["error"](name, output)}
        about = {"protocol": job.protocol, "tokens": len(prepared[0].samples[job.number]), "sample": job.number}
        about |= {"processes": True} if job.processes else {}
        order = [other for other in costs if other != name] + [name]
        yield [{"arm": arm} | about | {job.part: summed_up(costs[arm])} | outcomes[arm] for arm in order]


def _programs(prepared: list[Prepared], number: int, settings: Settings) -> dict[str, Any]:
    """Returns what to run of each arm on one sample, in the range of the ring: programs with their inputs."""
    layer, ring = settings.layer, (settings.field, settings.fraction_bits)
    attention: dict[str, tuple[Any, ...]] = {}
    whole: dict[str, tuple[Any, ...]] = {}
    for arm in prepared:
        one_hot, visible = arm.inputs(number)
        operands, prefix = arm.operands(number, layer), f"attention{layer}."
        own = {name: x for name, x in arm.of(number).weights.items() if name.startswith(prefix)}
        models = {arm.arm: arm.of(number)}
        if arm.arm == "softmax":
            models |= {name: of_kind(arm.of(number), kind) for name, kind in BESIDE.items()}
        for name, model in models.items():
            attention[name] = (attention_program(model, visible, layer), own, *operands)
            check(f"{name}'s attention", *ring, *attention[name])
        whole[arm.arm] = whole_program(arm.of(number), one_hot, visible)
        check(arm.arm, *ring, *whole[arm.arm])

    def error(name: str, output: np.ndarray) -> float:
        program, *inputs = attention[name]
        expected = np.asarray(program(*inputs))
        return float(np.abs(output - expected).max() / np.abs(expected).max())

    return {"attention": attention, "whole": whole, "error": error}


def _outcome(arm: Prepared, number: int, output: np.ndarray) -> dict[str, float]:
    """Returns how close what the parties computed is to softmax, and to the arm itself, in plain text."""
    tokens, plain, softmax = arm.samples[number], arm.plain[number], arm.softmax[number]
    if arm.model.checkpoint.causal:
        outputs = {"nll": output, "plain_nll": plain, "softmax_nll": softmax}
        return {name: nll(logits, tokens) for name, logits in outputs.items()}
    return {"cosine_to_softmax": cosine(output, softmax), "cosine_to_plain": cosine(output, plain)}
