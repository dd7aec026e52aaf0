"""Rows of configs/measurements.yaml that are trained from scratch: their budgets, and the choice of learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AT = "@"  # between the name of an arm and the learning rate that is tried


def with_budget(row: Mapping[str, Any], reduced: bool) -> dict[str, Any]:
    """Returns a row from scratch with what all its arms are told, and its reduced budget if that is to be measured.

    Raises:
        KeyError: the row has no reduced budget.
    """
    row = dict(row)
    smaller = row["reduced"] if reduced else {}
    changes = {"words": {**row["words"], **smaller.get("words", {})}}
    changes |= {name: smaller[name] for name in ("budget", "seeds", "remarks") if name in smaller}
    changes["grid"] = {**row["grid"], **smaller.get("grid", {})}
    arms = {arm: row["arms"][arm] for arm in smaller.get("arms", row["arms"])}
    own_words = smaller.get("arm_words", {})
    changes["arms"] = {
        name: {**arm, "words": {**words_of(arm, changes["words"], smaller), **own_words.get(name, {})}}
        for name, arm in arms.items()
    }
    return {**row, **changes}


def words_of(arm: Mapping[str, Any], shared: Mapping[str, Any], smaller: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an arm is told; what it overrides of the config joins what all arms do, or those of its kind."""
    words = dict(arm["words"])
    kind = arm.get("kind")  # of model, where a row has several
    overrides = smaller.get("kinds", {}).get(kind) or arm.get("config") or shared["config_overrides"]
    if kind is not None or "overrides" in arm:
        words["config_overrides"] = f"{overrides} {arm.get('overrides', '')}".strip()
    return words


def arms_of_grid(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns each arm with each learning rate of the row's grid, as arms; with one rate there is nothing to choose."""
    grid = row["grid"]
    if len(grid["rates"]) < 2:
        return {}
    return {
        f"{arm}{AT}{rate:g}": {**own, "words": {**own["words"], **grid["words"], "learning_rate": rate}}
        for arm, own in row["arms"].items()
        for rate in grid["rates"]
    }


def measure_of(row: Mapping[str, Any]) -> str:
    """Returns by which measure learning rates are chosen: the row's, unless its grid is too short for that to tell."""
    return str(row["grid"].get("metric", row["metric"]))


def chosen(row: Mapping[str, Any], measures: Mapping[str, float | None]) -> dict[str, float]:
    """Returns the learning rate of each arm with which it did best; the first if it diverged with all.

    Args:
        row: with its grid.
        measures: name of an arm of the grid -> its measure, see `measure_of`; None where it diverged.
    """
    rates = row["grid"]["rates"]
    sign = 1.0 if {**row, **row["grid"]}["higher_is_better"] else -1.0

    def quality(arm: str, rate: float) -> float:
        value = measures.get(f"{arm}{AT}{rate:g}")
        return -float("inf") if value is None else sign * value

    return {arm: max(rates, key=lambda rate: quality(arm, rate)) for arm in row["arms"]}


def as_table(row: Mapping[str, Any], measures: Mapping[str, float | None]) -> dict[str, dict[str, float | None]]:
    """Returns arm -> learning rate -> measure; empty if nothing was tried."""
    if not measures:
        return {}
    rates = row["grid"]["rates"]
    return {arm: {f"{rate:g}": measures[f"{arm}{AT}{rate:g}"] for rate in rates} for arm in row["arms"]}
