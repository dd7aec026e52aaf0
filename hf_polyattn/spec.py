"""What a polynomial is and what a patched model remembers of it: plain data, standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from .errors import SpecError

Normalizer = Literal["rsqrt", "mean", "none", "l1"]
Family = Literal["poly", "taylor"]
Granularity = Literal["head", "layer"]
RowShift = Literal["none", "linear", "moments"]

NORMALIZERS: tuple[str, ...] = get_args(Normalizer)
POWERS = (1, 2, 4, 8, 16, 32)
MAX_DEGREE = 8
MAX_REFINEMENTS = 2
MAX_SQUARES = 64
FORMAT_VERSION = 2  # 1 had no settings beside the tensors and no row_shift; it is read

GRAMMAR = (
    '("poly" | "taylor") degree ["^" power] ["~" refinements] ["-" normalizer], with degree 1..8, '
    "power 1|2|4|8|16|32, refinements 1|2 and normalizer rsqrt|mean|none|l1; "
    "for example poly3, poly3~1, poly6-l1 or poly3^16-l1"
)
_SPEC = re.compile(r"(poly|taylor)([1-9][0-9]*)(?:\^([1-9][0-9]*))?(?:~([1-9][0-9]*))?(?:-([a-z0-9]+))?")


@dataclass(frozen=True, slots=True)
class Polynomial:
    """The activation p_h(t)^s of attention scores and how a row of them is normalized.

    Attributes:
        family: where uncalibrated coefficients come from: `poly` is the monomial x^degree (the Taylor
            polynomial of exp(x/power) when power > 1, as x^(degree*power) overflows), `taylor` is the
            Taylor polynomial of exp(x/power).
        degree: P, 1 to 8.
        power: s, the exponent put on p, reached by squaring: 1, 2, 4, 8, 16 or 32.
        normalizer: the row scale r_i: `rsqrt` n^(-1/2), `mean` 1/n, `none` 1, `l1` 1/Σ|w|.
        refinements: how often the row's shift is moved by the polynomial's own row sum, 0 to 2.

    Source: arXiv 2410.18613 for `poly`, 2403.02920 for `taylor`; DESIGN.md, "The mathematics".

    >>> str(Polynomial.parse("poly3^16-l1"))
    'poly3^16-l1'
    >>> Polynomial.parse("poly3").initial_coefficients()
    (0.0, 0.0, 0.0, 1.0)
    """

    family: Family = "poly"
    degree: int = 3
    power: int = 1
    normalizer: Normalizer = "rsqrt"
    refinements: int = 0

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            raise SpecError(f"family {self.family!r} is not one of 'poly', 'taylor'. Grammar: {GRAMMAR}")
        if type(self.degree) is not int or not 1 <= self.degree <= MAX_DEGREE:
            raise SpecError(f"degree {self.degree!r} is not in 1..{MAX_DEGREE}. Grammar: {GRAMMAR}")
        if type(self.power) is not int or self.power not in POWERS:
            raise SpecError(f"power {self.power!r} is not one of {POWERS}. Grammar: {GRAMMAR}")
        if self.normalizer not in NORMALIZERS:
            raise SpecError(f"normalizer {self.normalizer!r} is not one of {NORMALIZERS}. Grammar: {GRAMMAR}")
        if type(self.refinements) is not int or not 0 <= self.refinements <= MAX_REFINEMENTS:
            raise SpecError(f"refinements {self.refinements!r} are not in 0..{MAX_REFINEMENTS}. Grammar: {GRAMMAR}")

    @classmethod
    def parse(cls, spec: str | Polynomial) -> Polynomial:
        """Returns the polynomial that a spec string names.

        Raises:
            SpecError: the string does not follow the grammar; the message quotes both.
        """
        if isinstance(spec, Polynomial):
            return spec
        if not isinstance(spec, str):
            raise SpecError(f"a spec is a string, got {type(spec).__name__} {spec!r}. Grammar: {GRAMMAR}")
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise SpecError(f"spec {spec!r} does not follow the grammar: {GRAMMAR}")
        family, degree, power, refinements, normalizer = match.groups()
        try:
            return cls(family, int(degree), int(power or 1), normalizer or "rsqrt", int(refinements or 0))  # type: ignore[arg-type]
        except SpecError as error:
            raise SpecError(f"spec {spec!r}: {error}") from None

    @classmethod
    def parse_several(cls, specs: Iterable[str | Polynomial]) -> list[Polynomial]:
        """Returns the polynomials that several spec strings name.

        Raises:
            SpecError: a single one, whose letters would be taken for specs, or one that does not follow the grammar.
        """
        if isinstance(specs, (str, Polynomial)):
            raise SpecError(f"a single spec was given, {str(specs)!r}, where several are expected: wrap it: [spec]")
        return [cls.parse(spec) for spec in specs]

    def __str__(self) -> str:
        power = f"^{self.power}" if self.power > 1 else ""
        refinements = f"~{self.refinements}" if self.refinements else ""
        normalizer = f"-{self.normalizer}" if self.normalizer != "rsqrt" else ""
        return f"{self.family}{self.degree}{power}{refinements}{normalizer}"

    def initial_coefficients(self) -> tuple[float, ...]:
        """Returns the P + 1 uncalibrated coefficients, ascending powers of t."""
        if self.family == "poly" and self.power == 1:
            return (0.0,) * self.degree + (1.0,)
        return tuple(1.0 / (math.factorial(k) * self.power**k) for k in range(self.degree + 1))


#: Fields of a `PolyAttentionConfig` that calibration sets.
CALIBRATED = ("interval", "clamp", "key_shift", "row_shift", "squares", "lengths")


@dataclass(frozen=True, slots=True)
class PolyAttentionConfig:
    """Which attention modules become polynomial, and with what.

    Attributes:
        spec: the polynomial; a string is parsed.
        layers: indices of the layers to patch; None for all of them.
        layer_specs: polynomials of single layers, (layer, spec) pairs or a mapping; the others have `spec`.
        include: glob patterns on module paths; None admits every path.
        exclude: glob patterns on module paths that stay softmax on purpose.
        cross_attention: also patch cross-attention modules.
        granularity: one polynomial per `head` or one per `layer`.
        learnable: whether the polynomial trains with the model; frozen otherwise.
        interval: whether scores are mapped by a center and a radius per head before the polynomial.
        clamp: whether t is limited to [-1, 1]. None, where nobody said, is no until `calibrate` makes it yes.
        key_shift: whether rows are shifted at all: `row_shift` is not none. True is the older way to ask for linear.
        row_shift: what moves the scores of a row to the interval: `none`, `linear` the key shift μ_h of its query, or
            `moments` that and the mean, variance and number of its scores.
        squares: R, squares of linear forms of the query that join the moments.
        lengths: the fewest and the most keys that a row of the calibration saw; None if there was none, or if it is not
            known. A forward pass far outside warns.
        backend: the operator's backend, `auto` or a name in `hf_polyattn.ops.BACKENDS`.

    `calibrate` switches interval, clamp and the row shift on, a clamp that is said to be False excepted. Source:
    DESIGN.md, "The mathematics".

    >>> PolyAttentionConfig.from_dict(PolyAttentionConfig("poly6-l1", layers=[0, 1]).to_dict()).layers
    (0, 1)
    """

    spec: Polynomial = Polynomial()
    layers: tuple[int, ...] | None = None
    layer_specs: tuple[tuple[int, Polynomial], ...] = ()
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    cross_attention: bool = False
    granularity: Granularity = "head"
    learnable: bool = True
    interval: bool = False
    clamp: bool | None = None
    key_shift: bool = False
    backend: str = "auto"
    row_shift: RowShift = "none"
    squares: int = 0
    lengths: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", Polynomial.parse(self.spec))
        object.__setattr__(self, "layers", _layer_indices(self.layers))
        object.__setattr__(self, "layer_specs", _layer_specs(self.layer_specs))
        object.__setattr__(self, "include", None if self.include is None else _patterns("include", self.include))
        object.__setattr__(self, "exclude", _patterns("exclude", self.exclude))
        if self.granularity not in get_args(Granularity):
            raise SpecError(f"granularity {self.granularity!r} is not one of {get_args(Granularity)}")
        if self.clamp is None and self.interval:
            object.__setattr__(self, "clamp", False)
        elif self.clamp is not None and not isinstance(self.clamp, bool):
            raise SpecError(f"clamp must be True, False or None, got {self.clamp!r}")
        for name in ("cross_attention", "learnable", "interval", "key_shift"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.row_shift not in get_args(RowShift):
            raise SpecError(f"row_shift {self.row_shift!r} is not one of {get_args(RowShift)}")
        if type(self.squares) is not int or not 0 <= self.squares <= MAX_SQUARES:
            raise SpecError(f"squares must be 0..{MAX_SQUARES} directions of the query, got {self.squares!r}")
        if self.squares and self.row_shift != "moments":
            raise SpecError(f"squares join the moments: row_shift must be 'moments', got {self.row_shift!r}")
        if self.key_shift and self.row_shift == "none":
            object.__setattr__(self, "row_shift", "linear")
        object.__setattr__(self, "key_shift", self.row_shift != "none")
        object.__setattr__(self, "lengths", _lengths(self.lengths))
        if not isinstance(self.backend, str):
            raise SpecError(f"backend must be a string, got {self.backend!r}")

    def __str__(self) -> str:
        single = [f"layer {layer}: {spec}" for layer, spec in self.layer_specs]
        return f"{self.spec} ({', '.join(single)})" if single else str(self.spec)

    def spec_of(self, layer: int) -> Polynomial:
        """Returns the polynomial of a layer."""
        return dict(self.layer_specs).get(layer, self.spec)

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as JSON types, with its format version."""
        data = asdict(self)
        data["spec"] = str(self.spec)
        data["layer_specs"] = {str(layer): str(spec) for layer, spec in self.layer_specs}
        for name in ("layers", "include", "exclude", "lengths"):
            data[name] = None if data[name] is None else list(data[name])
        return {"format_version": FORMAT_VERSION, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PolyAttentionConfig:
        """Returns the config that `to_dict` wrote.

        Raises:
            SpecError: not a mapping, no or another format version, or a key that this version does not know.
        """
        if not isinstance(data, Mapping):
            raise SpecError(f"a polyattn config is a mapping, got {type(data).__name__}")
        if "format_version" not in data:
            raise SpecError(
                f'polyattn config has no format_version; write "format_version": {FORMAT_VERSION} if it is one of this '
                "hf_polyattn, or patch and save the model again."
            )
        version = data["format_version"]
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise SpecError(
                f"polyattn config has format_version {version!r}; this hf_polyattn reads 1 to {FORMAT_VERSION}. "
                "Install the hf_polyattn that wrote it (pip install --upgrade hf_polyattn), or patch and save again."
            )
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known - {"format_version"})
        if unknown:
            raise SpecError(f"polyattn config has unknown keys {unknown}; known are {sorted(known)}")
        if "spec" not in data:
            raise SpecError(f"polyattn config has no 'spec'; it has {sorted(data)}")
        settings = {key: value for key, value in data.items() if key != "format_version"}
        if version == 1 and settings.get("clamp") is False and not settings.get("interval"):
            settings["clamp"] = None  # version 1 did not tell whether anybody had said so
        return cls(**settings)


def _layer_indices(layers: Iterable[int] | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, (str, int)) or not isinstance(layers, Iterable):
        raise SpecError(f"layers must be a sequence of layer indices or None, got {layers!r}")
    indices = tuple(layers)
    if any(type(index) is not int or index < 0 for index in indices):
        raise SpecError(f"layers must be indices >= 0, got {indices!r}")
    return tuple(sorted(set(indices)))


def _lengths(lengths: Any) -> tuple[int, int] | None:
    if lengths is None:
        return None
    pair = tuple(lengths) if isinstance(lengths, (tuple, list)) else ()
    if len(pair) != 2 or any(type(length) is not int for length in pair) or not 1 <= pair[0] <= pair[1]:
        raise SpecError(f"lengths must be the fewest and the most keys of a row, two integers >= 1, got {lengths!r}")
    return pair


def _layer_specs(specs: Any) -> tuple[tuple[int, Polynomial], ...]:
    expected = f"layer_specs must map layer indices to specs, got {specs!r}"
    if not isinstance(specs, (Mapping, tuple, list)):
        raise SpecError(expected)
    try:
        pairs = dict(specs)
        layers = _layer_indices([int(layer) if isinstance(layer, str) else layer for layer in pairs])
    except (TypeError, ValueError):
        raise SpecError(expected) from None
    if layers is None or len(layers) != len(pairs):
        raise SpecError(expected)
    return tuple(sorted((int(layer), Polynomial.parse(spec)) for layer, spec in pairs.items()))


def _patterns(name: str, patterns: Iterable[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        return (patterns,)
    patterns = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise SpecError(f"{name} must be glob patterns on module paths, got {patterns!r}")
    return patterns
