"""Specs are read and written by one grammar, and a config survives strings, dicts and JSON."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from hf_polyattn import PolyAttentionConfig, PolyAttnError, Polynomial, SpecError
from hf_polyattn.spec import GRAMMAR, MAX_DEGREE, NORMALIZERS, POWERS

LEGAL = list(itertools.product(("poly", "taylor"), range(1, MAX_DEGREE + 1), POWERS, NORMALIZERS, (0, 1, 2)))

FULL_CONFIG = PolyAttentionConfig(
    "taylor4^8-l1",
    layers=(0, 3),
    layer_specs=((3, "poly3"),),
    include=("encoder.*",),
    exclude=("*.5.attention",),
    cross_attention=True,
    granularity="layer",
    learnable=False,
    interval=True,
    clamp=True,
    key_shift=True,
    row_shift="moments",
    squares=4,
    lengths=(2, 77),
    backend="chunked",
)


def test_every_legal_polynomial_survives_its_string() -> None:
    polynomials = [Polynomial(*fields) for fields in LEGAL]
    assert [Polynomial.parse(str(polynomial)) for polynomial in polynomials] == polynomials
    assert len({str(polynomial) for polynomial in polynomials}) == len(LEGAL)


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("poly3", "poly3"),
        ("poly3^1", "poly3"),
        ("poly3-rsqrt", "poly3"),
        ("poly3^1-rsqrt", "poly3"),
        ("poly3^16-l1", "poly3^16-l1"),
        ("taylor2^1-l1", "taylor2-l1"),
        ("poly8-none", "poly8-none"),
    ],
)
def test_defaults_are_left_out_of_the_canonical_string(spec: str, canonical: str) -> None:
    assert str(Polynomial.parse(spec)) == canonical


def test_parsing_a_polynomial_returns_it() -> None:
    polynomial = Polynomial("taylor", 2, 4, "mean")
    assert Polynomial.parse(polynomial) is polynomial


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "poly",
        "softmax",
        "poly0",
        "poly9",
        "poly12",
        "poly03",
        "poly3.5",
        "poly-3",
        "poly٣",
        "poly3^3",
        "poly3^0",
        "poly3^64",
        "poly3^",
        "poly3^2.0",
        "poly3-",
        "poly3-l2",
        "poly3-rsqrt-l1",
        "poly3-l1^2",
        "POLY3",
        " poly3",
        "poly3\n",
        "relu3",
    ],
)
def test_wrong_specs_raise_and_quote_the_spec_and_the_grammar(spec: str) -> None:
    with pytest.raises(SpecError) as error:
        Polynomial.parse(spec)
    assert repr(spec) in str(error.value)
    assert GRAMMAR in str(error.value)


@pytest.mark.parametrize("spec", [None, 3, b"poly3", ["poly3"], {"degree": 3}])
def test_specs_that_are_no_strings_raise(spec: Any) -> None:
    with pytest.raises(SpecError, match="a spec is a string") as error:
        Polynomial.parse(spec)
    assert repr(spec) in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"family": "relu"},
        {"degree": 0},
        {"degree": 9},
        {"degree": True},
        {"degree": 3.0},
        {"power": 3},
        {"power": True},
        {"power": 2.0},
        {"normalizer": "softmax"},
        {"normalizer": None},
    ],
    ids=str,
)
def test_wrong_fields_raise_and_are_named(fields: dict[str, Any]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(SpecError) as error:
        Polynomial(**fields)
    assert f"{name} {value!r}" in str(error.value)
    assert GRAMMAR in str(error.value)


def test_spec_errors_are_value_errors() -> None:
    assert issubclass(SpecError, PolyAttnError)
    assert issubclass(PolyAttnError, ValueError)


@pytest.mark.parametrize("degree", range(1, MAX_DEGREE + 1))
def test_poly_starts_as_the_monomial(degree: int) -> None:
    assert Polynomial("poly", degree).initial_coefficients() == (0.0,) * degree + (1.0,)


@pytest.mark.parametrize("spec", ["taylor2-l1", "taylor6", "poly3^4-l1", "poly3^32", "taylor5^2-mean"])
def test_other_specs_start_as_the_taylor_polynomial_of_exp(spec: str) -> None:
    polynomial = Polynomial.parse(spec)
    coefficients = polynomial.initial_coefficients()
    assert coefficients == tuple(1 / math.factorial(k) / polynomial.power**k for k in range(polynomial.degree + 1))

    x = 0.5
    value = sum(c * x**k for k, c in enumerate(coefficients)) ** polynomial.power
    # Lagrange: p is off exp(x/s) by a relative (x/s)^(P+1)/(P+1)! at most, for x > 0; the power multiplies by s.
    remainder = (x / polynomial.power) ** (polynomial.degree + 1) / math.factorial(polynomial.degree + 1)
    assert value == pytest.approx(math.exp(x), rel=polynomial.power * remainder)
    assert value != pytest.approx(math.exp(x), rel=polynomial.power * remainder / 4)


def test_paper_defaults() -> None:
    assert str(Polynomial()) == "poly3"
    config = PolyAttentionConfig()
    assert config == PolyAttentionConfig("poly3")
    assert (config.interval, config.clamp, config.key_shift) == (False, None, False)


def test_polynomials_and_configs_are_immutable_and_hashable() -> None:
    config = PolyAttentionConfig("poly3", layers=[0])
    assert len({config, PolyAttentionConfig("poly3", layers=[0]), PolyAttentionConfig("poly4", layers=[0])}) == 2
    with pytest.raises(FrozenInstanceError):
        config.clamp = True  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        config.spec.degree = 4  # type: ignore[misc]


@pytest.mark.parametrize("config", [PolyAttentionConfig(), FULL_CONFIG], ids=["default", "full"])
def test_config_survives_json(config: PolyAttentionConfig) -> None:
    data = json.loads(json.dumps(config.to_dict()))
    assert PolyAttentionConfig.from_dict(data) == config
    assert data["spec"] == str(config.spec)


def test_no_field_of_the_full_config_is_a_default() -> None:
    """The control of the JSON test: a field that `to_dict` forgot would come back as its default."""
    full, default = FULL_CONFIG.to_dict(), PolyAttentionConfig().to_dict()
    assert [name for name in full if full[name] == default[name]] == ["format_version"]


def test_calibration_survives_json() -> None:
    config = replace(PolyAttentionConfig("poly6-l1"), interval=True, clamp=True)
    restored = PolyAttentionConfig.from_dict(config.to_dict())
    assert restored == config
    assert restored != PolyAttentionConfig("poly6-l1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"degree": 3, "kernel": "x"}, r"unknown keys \['degree', 'kernel'\]; known are \['backend', .*'squares'\]"),
        ({"format_version": 3}, "format_version 3; this hf_polyattn reads 1 to 2"),
        ({"format_version": None}, "format_version None"),
        ({"spec": "poly99"}, "spec 'poly99'"),
        ({"spec": None}, "a spec is a string, got NoneType"),
        ({"granularity": "token"}, "granularity 'token' is not one of"),
    ],
    ids=["unknown-keys", "newer-format", "no-format", "wrong-spec", "spec-null", "wrong-field"],
)
def test_wrong_dicts_raise(change: dict[str, Any], message: str) -> None:
    data = PolyAttentionConfig().to_dict()
    assert PolyAttentionConfig.from_dict(data) == PolyAttentionConfig()
    with pytest.raises(SpecError, match=message):
        PolyAttentionConfig.from_dict({**data, **change})


def test_dict_without_spec_raises() -> None:
    with pytest.raises(SpecError, match=r"has no 'spec'; it has \['format_version'\]"):
        PolyAttentionConfig.from_dict({"format_version": 1})


@pytest.mark.parametrize("data", ["poly3", None, [("spec", "poly3")]], ids=["string", "none", "list"])
def test_configs_are_read_from_mappings_only(data: Any) -> None:
    with pytest.raises(SpecError, match=f"is a mapping, got {type(data).__name__}"):
        PolyAttentionConfig.from_dict(data)


@pytest.mark.parametrize(
    ("layers", "indices"),
    [(None, None), ((), ()), ([2, 0, 2], (0, 2)), (range(3), (0, 1, 2)), ({4}, (4,)), (iter([1]), (1,))],
    ids=["all", "none", "unsorted", "range", "set", "iterator"],
)
def test_layers_become_sorted_indices(layers: Any, indices: tuple[int, ...] | None) -> None:
    assert PolyAttentionConfig(layers=layers).layers == indices


@pytest.mark.parametrize("layers", [3, "01", [-1], [0, "1"], [True], [1.0], 0.5], ids=repr)
def test_wrong_layers_raise(layers: Any) -> None:
    with pytest.raises(SpecError, match="layers must be"):
        PolyAttentionConfig(layers=layers)


def test_one_pattern_needs_no_list() -> None:
    config = PolyAttentionConfig(include="encoder.*", exclude="*.0.*")
    assert (config.include, config.exclude) == (("encoder.*",), ("*.0.*",))
    assert PolyAttentionConfig(include=["a", "b"]).include == ("a", "b")
    assert PolyAttentionConfig().include is None


@pytest.mark.parametrize("name", ["include", "exclude"])
@pytest.mark.parametrize("patterns", [3, [3], [None], b"encoder"], ids=repr)
def test_wrong_patterns_raise(name: str, patterns: Any) -> None:
    with pytest.raises(SpecError, match=f"{name} must be glob patterns"):
        PolyAttentionConfig(**{name: patterns})


def test_a_clamp_is_true_false_or_left_open() -> None:
    assert [PolyAttentionConfig(clamp=clamp).clamp for clamp in (True, False, None)] == [True, False, None]
    assert PolyAttentionConfig(interval=True).clamp is False
    assert PolyAttentionConfig.from_dict(PolyAttentionConfig().to_dict()) == PolyAttentionConfig()
    unclamped = PolyAttentionConfig(interval=True, clamp=False)
    assert PolyAttentionConfig.from_dict(unclamped.to_dict()) == unclamped
    with pytest.raises(SpecError, match="clamp must be True, False or None, got 1"):
        PolyAttentionConfig(clamp=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cross_attention", "learnable", "interval", "key_shift"])
@pytest.mark.parametrize("value", [None, 1, "yes"], ids=repr)
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(SpecError, match=f"{name} must be True or False, got {value!r}"):
        PolyAttentionConfig(**{name: value})


@pytest.mark.parametrize("backend", [None, 1], ids=repr)
def test_backend_is_a_name(backend: Any) -> None:
    with pytest.raises(SpecError, match="backend must be a string"):
        PolyAttentionConfig(backend=backend)
