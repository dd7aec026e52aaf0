"""What else a row shift could be made of, calibrated alone: what DESIGN.md calls tried.

    python tests/row_shift_study.py --write      # all of it, half an hour → benchmarks/row_shift.json
    python tests/row_shift_study.py llama degree-6 third-moments

An arm changes one part of the fit: the step g of a refinement, the features of a row, or the width of the interval of
each row. Its layers then compute in PyTorch what was fitted, and `library`, which changes nothing, is what the package
computes. `tests/quality.py` has the checkpoints, their calibration and held-out data, and the measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import quality
import torch
from torch import Tensor, nn

import hf_polyattn as hp
from hf_polyattn.adaptation import calibration
from hf_polyattn.adaptation.capture import Observation, Replay
from hf_polyattn.adaptation.fitting import layer, refinement
from hf_polyattn.adaptation.fitting.layer import LayerFit
from hf_polyattn.adaptation.fitting.refinement import FittedRefinement
from hf_polyattn.adaptation.fitting.regression import Regression
from hf_polyattn.adaptation.fitting.row_shift import Predictor, RowShift
from hf_polyattn.adaptation.fitting.rows import Rows, observed_rows
from hf_polyattn.adaptation.fitting.solves import solve
from hf_polyattn.ops.masks import visible_keys
from hf_polyattn.patching.patched import patched_layers
from hf_polyattn.patching.row_shift import FEATURES, ROW_SUMS, evaluate

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "row_shift.json"
CASES = ("llama", "gpt2-tinystories", "gpt2-zinc", "vit")
FEW = {"unchanged", "third-moments", "width-v^0.25", "degree-1"}  # arms that ViT-tiny, the slowest, is measured with


# ---------------------------------------------------------------- the step of a refinement


class Step(FittedRefinement):
    """A refinement whose step is linear in `basis` of the row sums S, held within ROW_SUMS, and of v.

    Its prior is the library's: log S, at the mean of v.
    """

    @classmethod
    def basis(cls, z: Tensor, v: Tensor) -> Tensor:
        """Returns the functions, (…, K), of z = S − 1 and of v, standardised and held within two deviations."""
        raise NotImplementedError

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        size = self.basis(torch.zeros(1), torch.zeros(1)).shape[-1]
        self._regression = Regression.zeros(len(self.coefficients), size, self.coefficients.device)

    def functions(self, rows: Rows, shifted: Tensor) -> Tensor:
        z = self.row_sums(rows, shifted).clamp(*ROW_SUMS) - 1.0
        place = 2 * self.shift.head_dim + FEATURES.index("v")
        mean, scale = (sums[:, place, None].float() for sums in (self.shift._mean, self.shift._scale))
        return self.basis(z, ((rows.moments()[1] - mean) / scale).clamp(-2.0, 2.0))

    def see(self, rows: Rows, shifted: Tensor) -> None:
        left = self.shift.target(rows) - (rows.scores - shifted)[..., 0]
        self._regression.add(self.functions(rows, shifted).double(), left, rows.weight)

    def solve(self) -> None:
        sums = self._regression
        s = torch.logspace(*map(math.log10, ROW_SUMS), 32, dtype=torch.float64)
        x, y, weight = self.basis(s - 1.0, torch.zeros_like(s)), s.log(), refinement._PRIOR * sums.count / len(s)
        gram, moment = sums.gram + weight * x.T @ x, sums.moment + weight * x.T @ y
        self.steps = solve(gram, moment, ridge=refinement._RIDGE)
        self.residual = sums.error(self.steps).sqrt()

    def of(self, rows: Rows, shifted: Tensor) -> Tensor:
        found: Tensor = torch.linalg.vecdot(self.functions(rows, shifted), self.steps.float()[:, None])
        return found


def powers(z: Tensor, degree: int) -> Tensor:
    """Returns 1, z … z^degree in a new last dimension."""
    return z.unsqueeze(-1) ** torch.arange(degree + 1, device=z.device)


def of_degree(degree: int) -> type[Step]:
    """Returns the step of that degree in S − 1."""

    class Power(Step):
        @classmethod
        def basis(cls, z: Tensor, v: Tensor) -> Tensor:
            return powers(z, degree)

    return Power


class Chebyshev(Step):
    """Degree 8 in Chebyshev polynomials on ROW_SUMS, which the ridge, and float32, meet better than powers."""

    degree = 8

    @classmethod
    def basis(cls, z: Tensor, v: Tensor) -> Tensor:
        low, high = ROW_SUMS
        t = (2.0 * z - (low + high - 2.0)) / (high - low)
        return torch.cos(t.clamp(-1.0, 1.0).acos().unsqueeze(-1) * torch.arange(cls.degree + 1))


class Halves(Step):
    """A cubic below S = 1 and another one above."""

    @classmethod
    def basis(cls, z: Tensor, v: Tensor) -> Tensor:
        return torch.cat([powers(z.clamp(max=0.0), 3), powers(z.clamp(min=0.0), 3)[..., 1:]], -1)


class WithVariance(Step):
    """Degree 4 in S − 1, whose coefficients are linear in v."""

    @classmethod
    def basis(cls, z: Tensor, v: Tensor) -> Tensor:
        return torch.cat([powers(z, 4), v.unsqueeze(-1) * powers(z, 4)], -1)


# ---------------------------------------------------------------- the features of a row


class ThirdMoments(RowShift):
    """A row shift that knows the third central moment κ of a row's visible scores as well: κ, m κ, v κ, κ²."""

    extra = 4

    def _restart(self) -> None:
        super()._restart()
        size = self._fitted.moment.shape[1] + self.extra
        self._fitted, self._held_out = (Regression.zeros(self.heads, size, self.device) for _ in range(2))

    def _features(self, rows: Rows) -> Tensor:
        mean, variance = rows.moments()
        cubes = ((rows.scores - mean.unsqueeze(-1)) ** 3 * rows.visible).sum(-1) / rows.count
        products = torch.stack([cubes, mean * cubes, variance * cubes, cubes * cubes], -1)[..., : self.extra]
        known = super()._features(rows)
        return torch.cat([known[..., :-1], products, known[..., -1:]], -1)

    def _used(self, predictor: Predictor) -> Tensor:
        used = super()._used(predictor)
        used[-1 - self.extra : -1] = predictor.kind == "moments"
        return used

    def _drop_squares(self) -> None:
        kept = torch.ones(self._fitted.moment.shape[1], dtype=torch.bool)
        kept[2 * self.head_dim + len(FEATURES) : -1 - self.extra] = False
        for sums in (self._fitted, self._held_out):
            sums.gram, sums.moment = sums.gram[:, kept][:, :, kept], sums.moment[:, kept]
        self.squares = self.squares[:, :0]


class ThirdMoment(ThirdMoments):
    """The same without products."""

    extra = 1


# ---------------------------------------------------------------- the width of a row


def width_by(exponent: float) -> Callable[[LayerFit, Rows, Tensor], Tensor]:
    """Returns what makes the interval of a row (v_i / v̄)^exponent times as wide, within a half and twice.

    The highest weight that a row can have, 1, keeps its place.
    """

    def rescaled(fit: LayerFit, rows: Rows, shifted: Tensor) -> Tensor:
        v = fit.shift._mean[:, 2 * fit.shift.head_dim + FEATURES.index("v"), None].float()
        times = ((rows.moments()[1] / v).clamp(min=1e-6) ** exponent).clamp(0.5, 2.0).unsqueeze(-1)
        top = fit.shift.alpha * rows.count.log().unsqueeze(-1)
        return (shifted - top) / times + top

    return rescaled


# ---------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """What is changed: classes of the fit, and what is done to shifted scores before the polynomial."""

    shift: type[RowShift] = RowShift
    step: type[FittedRefinement] = FittedRefinement
    rescaled: Callable[[LayerFit, Rows, Tensor], Tensor] | None = None


ARMS: dict[str, dict[str, Arm]] = {
    "poly3": {
        "unchanged": Arm(),
        "third-moment": Arm(shift=ThirdMoment),
        "third-moments": Arm(shift=ThirdMoments),
        **{f"width-v^{exponent}": Arm(rescaled=width_by(exponent)) for exponent in (-0.25, 0.25, 0.5)},
    },
    "poly3~1": {
        "unchanged": Arm(),
        **{f"degree-{degree}": Arm(step=of_degree(degree)) for degree in (1, 2, 6, 8)},
        "chebyshev-8": Arm(step=Chebyshev),
        "halves": Arm(step=Halves),
        "with-variance": Arm(step=WithVariance),
        "third-moments": Arm(shift=ThirdMoments),
        "width-v^0.25": Arm(rescaled=width_by(0.25)),
    },
}


class StudyFit(LayerFit):
    """A fit of an arm, which runs in place of the layer that it is of."""

    arm = Arm()

    def passed_on(self, rows: Rows) -> Tensor:
        """Returns the shifted scores that the polynomial, or the next refinement, is fitted to."""
        shifted = rows.scores - self.shift.of(rows).unsqueeze(-1)
        for part in self.refinements:
            shifted = shifted - part.of(rows, shifted).unsqueeze(-1)
        last = len(self.refinements) == self.config.spec.refinements
        return self.arm.rescaled(self, rows, shifted) if last and self.arm.rescaled else shifted

    def _shifted(self, see: Callable[[Rows, Tensor], None]) -> Callable[[Rows], None]:
        return lambda rows: see(rows, self.passed_on(rows))

    def run(self, clamped: Tensor, query: Tensor, key: Tensor, value: Tensor, **pattern: Any) -> Tensor:
        """Returns what the layer computes; counts scores below the interval, above it, and all of them."""
        pattern = {name: pattern.get(name) for name in ("mask", "ranges", "causal", "window", "scaling")}
        scaling = pattern.pop("scaling") or query.shape[-1] ** -0.5
        mask = visible_keys(range(query.shape[2]), key.shape[2], device=query.device, **pattern)
        nothing = value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        seen = Observation(query, key, value, nothing, mask, causal=False, window=None, scaling=scaling, real=None)
        radius, found = (self.width / 2.0).float()[:, None, None], []
        for rows in observed_rows(self.path, seen, 1):
            t = (self.passed_on(rows) - self.top.float()[:, None, None]) / radius + 1.0
            counted = [(t < -1.0) * rows.visible, (t > 1.0) * rows.visible, rows.visible.expand_as(t)]
            clamped += torch.stack([some.double().sum() for some in counted])
            w = evaluate(self.config.spec, self.coefficients.float()[:, None, None], t.clamp(-1.0, 1.0)) * rows.visible
            out = rows.apply(w) * rows.fixed_scale(self.config.spec.normalizer).unsqueeze(-1)
            found.append(out.transpose(1, 2))
        return torch.cat(found)


@contextmanager
def fitted(model: nn.Module, batches: list[dict[str, Tensor]], spec: str, arm: Arm) -> Iterator[Tensor]:
    """Within, a patched model computes what an arm fits; yields how many scores were clamped, see `StudyFit.run`."""
    children, clamped = dict(patched_layers(model)), torch.zeros(3, dtype=torch.float64)
    specs = dict.fromkeys(children, hp.Polynomial.parse(spec))
    choice = calibration.choice_for(specs.values(), "auto", None)
    parts = {"RowShift": arm.shift, "FittedRefinement": arm.step}
    with (
        mock.patch.multiple(layer, **parts),
        mock.patch.object(calibration, "LayerFit", StudyFit),
        mock.patch.object(StudyFit, "arm", arm),
    ):
        fits = calibration.fit_layers(model, Replay(model, batches, progress=False), specs, choice)
        for path, child in children.items():
            child.forward = partial(fits[path].run, clamped)
        try:
            yield clamped
        finally:
            for child in children.values():
                del child.forward


def measured(case: quality.Case, spec: str, arm: Arm) -> dict[str, Any]:
    """Returns the measures of an arm, and the shares of scores below and above the intervals."""
    hp.patch_model(case.model, spec)
    try:
        with fitted(case.model, case.batches, spec, arm) as clamped:
            measures = case.measure(case.model)
        below, above, count = clamped.tolist()
        return {**measures, "below": below / count, "above": above / count}
    finally:
        hp.unpatch_model(case.model)


def study(case: quality.Case, chosen: dict[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Yields the table of a checkpoint after each arm of each spec: spec → arm → measures."""
    table: dict[str, Any] = {"softmax": case.measure(case.model)}
    for spec, arms in chosen.items():
        table[spec] = {"library": quality.calibrated(case, spec)}
        for name in arms:
            table[spec][name] = measured(case, spec, ARMS[spec][name])
            yield table


def main() -> None:
    every = dict.fromkeys(name for arms in ARMS.values() for name in arms)
    names, asked, writes = quality.asked(__doc__, CASES, every, RESULTS)
    for name in names:
        few = FEW if name == "vit" else every
        chosen = {spec: [arm for arm in arms if arm in asked and arm in few] for spec, arms in ARMS.items()}
        for table in study(quality.CASES[name](), chosen):
            spec, arms = [*table.items()][-1]
            print(name, spec, *[*arms.items()][-1], flush=True)
        if writes:
            kept = quality.read(RESULTS).get(name, {})
            both = {spec: {**kept.get(spec, {}), **arms} for spec, arms in table.items()}
            quality.write(RESULTS, "python tests/row_shift_study.py --write", name, {**kept, **both})


if __name__ == "__main__":
    main()
