"""What `measuring` found: as a table, and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_polyattn.errors import InputError
from hf_polyattn.figures.style import INK, canvas, color_of, save, styled
from hf_polyattn.tables import format_table

BASELINE = "softmax"
#: Bits a second and seconds that a message takes one way, of the networks that costs are computed for.
NETWORKS = {"LAN": (1e9, 0.0005), "WAN": (1e8, 0.02)}


def over(network: str, cost: dict[str, Any]) -> float:
    """Returns computed seconds: those measured, the bytes at the network's rate, and its delay for each message."""
    rate, delay = NETWORKS[network]
    return float(cost["seconds"] + 8.0 * cost["bytes_sent"] / rate + cost["rounds"] * delay)


def baseline_of(results: dict[str, Any], case: dict[str, Any], part: str) -> dict[str, Any]:
    """Returns softmax's case beside another."""
    same = ("protocol", "sample", "processes")
    return next(
        other
        for other in results["cases"]
        if other["arm"] == BASELINE and part in other and all(other.get(name) == case.get(name) for name in same)
    )


def rows_of(results: dict[str, Any], part: str) -> list[tuple[str, ...]]:
    """Returns the rows of `table` for `attention`, of one layer, or the `whole` model."""
    found = []
    for case in results["cases"]:
        if part not in case:
            continue
        cost, base = case[part], baseline_of(results, case, part)[part]
        outcome = case.get("nll", case.get("cosine_to_softmax")) if part == "whole" else None
        found.append(
            (
                f"{case['protocol']}{', processes' if case.get('processes') else ''}",
                str(case["tokens"]),
                f"`{case['arm']}`",
                f"{cost['seconds']:.2f}",
                f"{base['seconds'] / cost['seconds']:.2f}",
                f"{cost['bytes_sent'] / 2**20:.1f}",
                f"{cost['rounds']:.0f}",
                f"{cost['rounds'] / base['rounds']:.2f}",
                *(f"{over(name, cost):.2f} ({over(name, base) / over(name, cost):.1f} ×)" for name in NETWORKS),
                *([] if part == "attention" else ["–" if outcome is None else f"{outcome:.4f}"]),
            )
        )
    return found


HEADER = ("protocol", "tokens", "arm", "seconds", "times softmax's speed", "MiB sent", "rounds", "of softmax's rounds")
HEADER += tuple(f"{name}, computed" for name in NETWORKS)


def table(results: dict[str, Any]) -> str:
    """Returns the costs as text: of one layer's attention, and of the whole model."""
    parts = ["one layer's attention", format_table(HEADER, rows_of(results, "attention"))]
    whole = rows_of(results, "whole")
    if whole:
        parts += ["", "the whole model", format_table((*HEADER, outcome_name(results)), whole)]
    return "\n".join(parts)


@styled
def plot(results: dict[str, Any], path: Path) -> None:
    """Writes a picture: seconds and rounds of one layer's attention, by arm, a panel for each protocol and length."""
    cases = [case for case in results["cases"] if "attention" in case and not case.get("processes")]
    groups = list(dict.fromkeys((case["protocol"], case["tokens"]) for case in cases))
    figure, axes = canvas(2, len(groups), 3.4 * len(groups) + 1.2, 6.0)
    for column, (protocol, tokens) in enumerate(groups):
        chosen = [case for case in cases if (case["protocol"], case["tokens"]) == (protocol, tokens)]
        names = [case["arm"] for case in chosen]
        colors = [INK if "softmax" in name else color_of(0) for name in names]
        for axis, key in zip(axes[:, column], ("seconds", "rounds"), strict=True):
            axis.barh(names[::-1], [case["attention"][key] for case in chosen][::-1], color=colors[::-1])
            axis.set(title=f"{protocol}, {tokens} tokens" if key == "seconds" else "", xlabel=key)
            axis.grid(visible=False, axis="y")
            if column:
                axis.set_yticklabels([])
    figure.suptitle("Attention of one layer among parties")
    save(figure, path)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns rows as a table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page(text: str, tables: dict[str, str]) -> str:
    """Returns a page with these tables in place of those between `<!-- name -->` and `<!-- end of name -->`."""
    for name, content in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise InputError(f"the page has no {start.strip()} … {end}")
        text = f"{before}{start}\n{content}\n\n{end}{after}"
    return text


def tables(every: dict[str, Any]) -> dict[str, str]:
    """Returns the tables of docs/private_inference.md, of benchmarks/private.json, by name."""
    from .depths import HEADER as DEPTHS
    from .depths import rows

    found = {"depths": markdown(DEPTHS, rows())}
    for name, results in every.items():
        for part, more in (("attention", ()), ("whole", (outcome_name(results),))):
            measured = rows_of(results, part)
            if measured:
                found[f"{part} of {name}"] = markdown((*HEADER, *more), measured)
    return found


def outcome_name(results: dict[str, Any]) -> str:
    """Returns what the last column of the whole model's table is."""
    return "NLL" if any("nll" in case for case in results["cases"]) else "cosine to softmax"
