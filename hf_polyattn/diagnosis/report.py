"""What `diagnose` found: numbers, what they say, as a table and as a picture."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..tables import format_table


@dataclass(frozen=True, slots=True)
class LayerDiagnosis:
    """One attention module. Tuples have one entry a query head; norms are of the attention matrix of one sequence,
    root mean square over the sequences, and without padding.

    Attributes:
        path: of the attention module.
        rows: N, query rows of a sequence that are not padding, mean over the sequences.
        softmax_norm, polynomial_norm: Frobenius norm of the attention matrix.
        softmax_jacobian, polynomial_jacobian: Frobenius norm of its Jacobian with respect to the scaled scores.
        score_range: lowest and highest score in units of t: the calibrated interval is [−1, 1].
        below, above: shares of the visible scores below and above the interval; None where there is none. Many
            below are as it should be, since softmax is almost nil there; few should be above.
        non_finite: how many visible scores, or weights p(t)^s, float32 cannot hold.
        clamp: whether t is limited to the interval.
    """

    path: str
    rows: float
    softmax_norm: tuple[float, ...]
    polynomial_norm: tuple[float, ...]
    softmax_jacobian: tuple[float, ...]
    polynomial_jacobian: tuple[float, ...]
    score_range: tuple[tuple[float, float], ...]
    below: tuple[float, ...] | None
    above: tuple[float, ...] | None
    non_finite: tuple[int, ...]
    clamp: bool = True

    @property
    def far(self) -> float:
        """How far scores go outside an interval that nothing holds them to, radii, of the worst head; 0 if clamped."""
        if self.clamp or self.below is None:
            return 0.0
        return max(0.0, *(max(-low, high) - 1.0 for low, high in self.score_range))

    @property
    def bound(self) -> float:
        """√N, which softmax's norm cannot exceed."""
        return math.sqrt(self.rows)

    @property
    def jacobian_bound(self) -> float:
        """2√N, which the norm of softmax's Jacobian cannot exceed."""
        return 2.0 * math.sqrt(self.rows)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `diagnose` found; prints as a table and says which layers need attention.

    Attributes:
        spec: the polynomial.
        layers: one `LayerDiagnosis` per patched attention module, in model order.
    """

    spec: str
    layers: tuple[LayerDiagnosis, ...]

    #: A mean norm that differs from softmax's by more than this factor is said to be unlike it.
    UNLIKE = 2.0
    #: A layer with a larger share of its scores above the interval is said to have left it.
    ABOVE = 0.01
    #: Without a clamp a score that is so many radii outside of the calibrated scores is said to be far: a polynomial of
    #: degree P is up to T_P(1 + FAR) times its largest value there, 3 times for a cubic.
    FAR = 0.16

    def to_dict(self) -> dict[str, Any]:
        """Returns the diagnosis as JSON types; None for a norm that is not finite."""
        return _json(asdict(self))  # type: ignore[no-any-return]

    @property
    def verdict(self) -> str:
        """What is wrong in which layers, and what to do, in plain words."""
        found = {
            "scores or weights are not finite ({}): go back to weights before that": [
                layer.path for layer in self.layers if any(layer.non_finite)
            ],
            "scores leave the calibrated interval at its top ({}): calibrate on data like this": [
                layer.path for layer in self.layers if layer.above is not None and _mean(layer.above) > self.ABOVE
            ],
            f"norms differ from softmax's by more than a factor of {self.UNLIKE:g} ({{}}): calibrate, then train": [
                layer.path for layer in self.layers if self._is_unlike(layer)
            ],
        }
        farthest = max(layer.far for layer in self.layers)
        found[
            f"nothing clamps the scores, and they go up to {farthest:.2f} radii beyond those of the calibration "
            "({}): calibrate on data like this, or with a clamp"
        ] = [layer.path for layer in self.layers if layer.far > self.FAR]
        said = [
            text.format("every layer" if len(paths) == len(self.layers) > 1 else ", ".join(paths))
            for text, paths in found.items()
            if paths
        ]
        return "; ".join(said) + "." if said else "norms are like softmax's, and scores in their intervals."

    def _is_unlike(self, layer: LayerDiagnosis) -> bool:
        ratio = _mean(layer.polynomial_norm) / max(_mean(layer.softmax_norm), 1e-30)
        return not 1.0 / self.UNLIKE <= ratio <= self.UNLIKE

    def __str__(self) -> str:
        norm, jacobian = "norm / √N", "Jacobian / 2√N"
        header = ("module", f"softmax {norm}", norm, f"softmax {jacobian}", jacobian, "outside %", "non-finite")
        rows = []
        for layer in self.layers:
            outside = "no interval"
            if layer.below is not None and layer.above is not None:
                outside = f"{100 * _mean(layer.below):.2f} below, {100 * _mean(layer.above):.2f} above"
            rows.append(
                (
                    layer.path,
                    f"{_mean(layer.softmax_norm) / layer.bound:.3f}",
                    f"{_mean(layer.polynomial_norm) / layer.bound:.3g}",
                    f"{_mean(layer.softmax_jacobian) / layer.jacobian_bound:.3f}",
                    f"{_mean(layer.polynomial_jacobian) / layer.jacobian_bound:.3g}",
                    outside,
                    sum(layer.non_finite),
                )
            )
        return f"{format_table(header, rows)}\n{self.spec}, means over heads: {self.verdict}"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture, in the format of the suffix (PNG without one): norms left, Jacobian norms right.

        Lines are means over heads, bands reach from the lowest head to the highest, dashes are softmax's bounds.
        Needs matplotlib.
        """
        from matplotlib.figure import Figure

        target = Path(path)
        figure = Figure(figsize=(11.0, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw(left, "Attention matrix ‖A‖", "√N", self, ("softmax_norm", "polynomial_norm", "bound"))
        _draw(right, "Jacobian ‖∇A‖", "2√N", self, ("softmax_jacobian", "polynomial_jacobian", "jacobian_bound"))
        unfinished = target.with_name(f".{target.name}.unfinished")
        figure.savefig(unfinished, format=target.suffix[1:] or "png", dpi=150)
        unfinished.replace(target)


def _mean(numbers: tuple[float, ...]) -> float:
    return sum(numbers) / len(numbers)


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(axes: Any, title: str, bound: str, diagnosis: Diagnosis, names: tuple[str, str, str]) -> None:
    """Draws one norm of softmax and of the polynomial over the layers, and softmax's bound."""
    numbers = range(len(diagnosis.layers))
    for name, label, color in ((names[0], "softmax", "tab:blue"), (names[1], diagnosis.spec, "tab:orange")):
        heads = [getattr(layer, name) for layer in diagnosis.layers]
        axes.plot(numbers, [_mean(layer) for layer in heads], "o-", markersize=4, color=color, label=label)
        axes.fill_between(
            numbers, [min(layer) for layer in heads], [max(layer) for layer in heads], color=color, alpha=0.15, lw=0
        )
    bounds = [getattr(layer, names[2]) for layer in diagnosis.layers]
    axes.plot(numbers, bounds, "--", color="black", label=f"softmax's bound {bound}")
    axes.set(title=f"{title}, mean and range over heads", xlabel="patched layer", ylabel="Frobenius norm", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
