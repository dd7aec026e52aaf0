"""Pieces of the page as HTML, readable by screen readers; every text that comes from elsewhere is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from ..figures.style import SERIES
from .answers import Answers, near_one
from .session import Position, Session

#: What folders are called by those who save models into them, whatever model it is.
_ANY = re.compile(r"model|checkpoint-\d+")
_OWN_SOFTMAX = (
    "“Softmax” on this page is softmax with the weights of this folder. If they were trained with its polynomials, "
    "that is not the model that they were made from."
)


def block(content: str) -> str:
    """Returns content with this page's style."""
    return f'<div class="pa">{content}</div>'


def heading(text: str, saying: str = "") -> str:
    """Returns a section's heading and what the section is for."""
    return block(f"<h2>{escape(text)}</h2>" + (f"<p class='facts'>{escape(saying)}</p>" if saying else ""))


def title(session: Session) -> str:
    """Returns the head of the page: what is explored."""
    kind = "texts" if session.texts else "images"
    state = f"polynomial: {session.spec}" if session.spec else "softmax, as it was published"
    if session.loaded_polynomial and session.position is None:
        state += ", as it was saved"
    facts = (
        f"{type(session.model).__name__} · {session.model.num_parameters() / 1e6:.1f} M parameters · {kind} · {state}"
    )
    said = f"<h1>{escape(short_name(session.name))}</h1><p class='facts'>{escape(facts)}</p>"
    return block(said + (f"<p class='facts'>{escape(_OWN_SOFTMAX)}</p>" if session.loaded_polynomial else ""))


def short_name(name: str) -> str:
    """Returns a Hub id as it is, and of a folder its own name; the folders around it too if it is called as any is."""
    parts = Path(name).absolute().parts[1:] if Path(name).is_dir() else ()
    if not parts:
        return name
    return "/".join(parts[-3:]) if _ANY.fullmatch(parts[-1]) else parts[-1]


def status(message: str, error: bool = False) -> str:
    """Returns a sentence that screen readers say at once."""
    if not message:
        return block('<div role="status" aria-live="polite"></div>')
    role = 'role="alert"' if error else 'role="status" aria-live="polite"'
    return block(f'<div {role} class="{"error" if error else "done"}">{escape(message)}</div>')


def empty(saying: str) -> str:
    """Returns what stands where there is nothing yet."""
    return block(f'<p class="empty">{escape(saying)}</p>')


def figure(drawing: str) -> str:
    """Returns a drawing, an SVG element that describes itself."""
    return block(f"<figure>{drawing.replace(SERIES[0], 'var(--series)')}</figure>")


def table(caption: str, header: Iterable[str], rows: Iterable[Iterable[str]], note: str = "") -> str:
    """Returns a table with a caption and headers that screen readers read out."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    said = f"<p>{escape(note)}</p>" if note else ""
    return block(
        f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{said}"
    )


def answers_table(found: Answers) -> str:
    """Returns what both models say, side by side."""
    return table(found.title, found.header, found.rows, found.note)


def cards(position: Position) -> str:
    """Returns the figures of a position of the dial."""
    layers = position.report.layers
    means = [sum(own.explained_variance) / len(own.explained_variance) for own in layers]
    worst = min(range(len(means)), key=means.__getitem__)
    where = f"on {position.held_out} examples that it was not calibrated on"
    if not position.held_out:
        where = "on the examples of the calibration themselves: with fewer than 8 none is held out"
    shown = (
        (near_one(position.agreement), f"agreement with softmax, {where}; 1 is the same"),
        (f"{means[worst]:.4f}", f"explained variance of the layer that fits worst, layer {worst}"),
        (f"{position.time_ratio:.2f} ×", "time of a batch beside softmax, on this machine"),
        (f"{position.report.rows}", "rows that a layer was calibrated on, a token or a patch each"),
    )
    boxes = "".join(f'<div class="card"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in shown)
    few = position.report.too_few_rows
    warned = f'<p role="alert" class="error">{escape(few)}</p>' if few else ""
    return block(f'<div class="cards">{boxes}</div>{warned}')


def layers_table(position: Position) -> str:
    """Returns what the calibration says of every layer."""
    rows = []
    for number, layer in enumerate(position.report.layers):
        low, mean = min(layer.explained_variance), sum(layer.explained_variance) / len(layer.explained_variance)
        spread, residual = (sum(own) / len(own) for own in (layer.spread, layer.residual))
        rows.append((str(number), layer.path, f"{mean:.4f}", f"{low:.4f}", f"{spread:.2f}", f"{residual:.2f}"))
    header = ("layer", "module", "explained variance", "worst head", "spread of row sums, nats", "left of it, nats")
    return table("Each layer", header, rows)
