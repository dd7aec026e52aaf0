"""The committed pictures are drawn from the committed results, and nothing in them lies on anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hf_polyattn.bench import redraw
from hf_polyattn.errors import InputError
from hf_polyattn.figures import draw_speedups, svg
from hf_polyattn.figures.style import GRID, INK, SERIES, canvas, styled

ROOT = Path(__file__).resolve().parents[2]
CPU: dict[str, Any] = json.loads((ROOT / "benchmarks/cpu.json").read_text())


def drawn(figure: Any) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    agg = FigureCanvasAgg(figure)
    agg.draw()
    return agg.get_renderer()


def test_bars_keep_their_height_beside_a_limit_far_above_them() -> None:
    figure = draw_speedups(CPU)
    drawn(figure)
    limits = [row["forward"]["limit_speedup"] for row in CPU["rows"]]
    panels = figure.axes
    assert len(panels) == 4
    for panel in panels:
        tallest = max(bar.get_height() for bar in panel.patches)
        assert 0.3 * panel.get_ylim()[1] < tallest < panel.get_ylim()[1]
    assert max(limits) > 10 * panels[0].get_ylim()[1]  # what it would be pressed flat by
    assert any(f"limit {max(limits):.0f} ×" in text.get_text() for panel in panels for text in panel.texts)


def test_legend_lies_on_no_panel() -> None:
    figure = draw_speedups(CPU)
    renderer = drawn(figure)
    (legend,) = figure.legends
    box = legend.get_window_extent(renderer)
    assert not any(box.overlaps(panel.get_tightbbox(renderer)) for panel in figure.axes)


def test_redraw_writes_the_picture_beside_its_results(tmp_path: Path) -> None:
    copy = tmp_path / "bench.json"
    copy.write_text(json.dumps(CPU))
    assert redraw(copy).read_bytes()[:4] == b"\x89PNG"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bench.json", "bench.png"]


@pytest.mark.parametrize("content", ["not json", "[]", '{"rows": []}', '{"rows": [{"dtype": "float32"}]}'])
def test_redraw_refuses_what_bench_did_not_write(tmp_path: Path, content: str) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(InputError, match=r"bench\.json"):
        redraw(tmp_path / "bench.json")
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


@styled
def one_line() -> Any:
    figure, ((axes,),) = canvas(1, 1, 2.0, 2.0)
    axes.plot([0, 1], [0, 1])
    axes.set_xlabel("tokens < 5 & more")
    return figure


def test_svg_takes_the_colours_of_its_page_and_says_what_it_shows() -> None:
    text = svg(one_line(), 'a "line" & more')
    element = ElementTree.fromstring(text)
    assert element.get("role") == "img"
    assert element.get("aria-label") == 'a "line" & more'
    assert "currentColor" in text
    assert INK not in text
    assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_two_svgs_in_one_page_share_no_ids() -> None:
    ids = [{e.get("id") for e in ElementTree.fromstring(svg(one_line(), "x")).iter() if e.get("id")} for _ in range(2)]
    clips = [{name for name in own if name and len(name) == 11} for own in ids]
    assert clips[0]
    assert not clips[0] & clips[1]


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255.0 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_text_and_lines_can_be_read() -> None:
    """WCAG 2.2: 4.5 for text, 3 for what carries meaning, on dark pages too, whose ground SVGs take."""
    assert contrast(INK, "#ffffff") > 4.5
    assert all(contrast(color, "#ffffff") > 3.0 for color in SERIES[:3])
    assert all(contrast(color, "#0f1117") > 3.0 for color in SERIES)
    assert contrast(GRID, "#ffffff") < 3.0  # the control: a grid stays behind


def test_a_figure_shows_itself_in_a_notebook() -> None:
    assert one_line()._repr_png_()[:4] == b"\x89PNG"
