"""What `diagnose` found: numbers, what they say, as a table and as a picture."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from ..figures import draw_norms, save
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
        agreement: `similarity` of the model's outputs to those that it gives under softmax, on the same batches; 1 is
            the same. None if its outputs have neither logits nor hidden states, or are not finite.
    """

    spec: str
    layers: tuple[LayerDiagnosis, ...]
    agreement: float | None = None

    #: A mean norm that differs from softmax's by more than this factor is said to be unlike it.
    UNLIKE = 2.0
    #: A layer with a larger share of its scores above the interval is said to have left it.
    ABOVE = 0.01
    #: Outputs that agree less with softmax's are said not to be softmax's.
    AGREES = 0.9
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
        if self.agreement is not None and self.agreement < self.AGREES:
            said.append(
                f"outputs are not those of softmax with these weights (agreement {self.agreement:.2f}): calibrate on "
                "data like this, unless the model was trained away from softmax"
            )
        if said:
            return "; ".join(said) + "."
        outputs = "" if self.agreement is None else f", outputs agree with softmax's ({self.agreement:.3f})"
        return f"norms are like softmax's{outputs}, and scores are in their intervals."

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
        save(draw_norms(self), path)


def _mean(numbers: tuple[float, ...]) -> float:
    return sum(numbers) / len(numbers)


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
