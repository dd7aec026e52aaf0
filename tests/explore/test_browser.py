"""The whole way in a real Chromium: dial, maps, outputs, curves, saved; a sentence and a picture.

POLYATTN_SCREENSHOTS=folder keeps screenshots there; those of docs/images are made so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hf_polyattn as hp
from hf_polyattn.explore import Session

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[explore]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
Make = Callable[..., Any]
WAIT = 300_000  # milliseconds: calibrations on a busy machine


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """A page in the browser, and all that it asked for and complained of."""

    def __init__(self, browser: Any, address: str, scheme: str) -> None:
        self.address, self.complaints, self.asked = address, [], []
        self.page = browser.new_page(viewport={"width": 1280, "height": 1000}, color_scheme=scheme)
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)

    def calibrate(self, spec: str) -> None:
        self.page.get_by_role("radio", name=f"{spec}:").check()
        self.page.get_by_role("button", name="Calibrate", exact=True).click()
        self.page.get_by_text(f"{spec} is calibrated").wait_for(timeout=WAIT)

    def picture(self, described: str) -> Any:
        """Returns the drawing that says so of itself, once it is there."""
        found = self.page.get_by_role("img", name=described)
        found.wait_for(timeout=WAIT)
        return found

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab).click()

    def keep(self, name: str) -> None:
        """Keeps a screenshot, if somebody wants to look at it."""
        if folder := os.environ.get("POLYATTN_SCREENSHOTS"):
            self.page.wait_for_timeout(3000)  # what still fades in
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    def check(self) -> None:
        """Asserts that nothing was fetched from another host, and that nothing went wrong."""
        own = [url for url in self.asked if url.startswith(self.address)]
        others = [url for url in self.asked if not url.startswith((self.address, "data:", "blob:"))]
        assert len(own) > 10
        assert others == []
        assert self.complaints == []


@pytest.fixture
def named(checkpoint: Make, rows: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`named(name, title, count, layers)`: a session of a folder here that is called so, a few layers of it patched."""

    def make(name: str, title: str, count: int, layers: list[int] | None = None) -> Session:
        monkeypatch.chdir(tmp_path)
        softmax = checkpoint(name).resolve()
        if layers is None:
            (tmp_path / title).symlink_to(softmax)
        else:
            made = Session(str(softmax), "cpu")
            hp.patch_model(made.model, "poly3^16-l1", layers=layers)
            made.save(title)
        return Session(title, "cpu", rows(name, count))

    return make


def test_a_sentence_goes_the_whole_way(chromium: Any, named: Make, served: Make, tmp_path: Path) -> None:
    made = named("minilm", "all-MiniLM-L6-v2", 16)
    with served(made) as address:
        visitor = Visitor(chromium, address, "light")
        page = visitor.page
        visitor.calibrate("poly3")
        first = visitor.picture("attention weights of softmax").inner_html()
        text = page.get_by_label("Your text, a line for each")
        text.fill("The bank raised its rates.\nThe river burst its banks.")
        page.get_by_label("Head of the attention maps").click()
        page.get_by_role("option", name="3", exact=True).click()
        page.get_by_role("img", name="head 3: attention weights").wait_for(timeout=WAIT)
        page.get_by_role("button", name="Show").click()
        drawn = visitor.picture("head 3: attention weights").inner_html()
        assert drawn != first
        assert "rates" in drawn
        visitor.keep("explorer-text")
        visitor.open("Outputs")
        page.get_by_role("cell", name="The river burst its banks.").wait_for(timeout=WAIT)
        visitor.open("Curves")
        visitor.picture("The polynomial of each head of encoder.layer.0")
        visitor.keep("explorer-text-curves")
        page.get_by_label("Folder to save to").fill(str(tmp_path / "kept"))
        page.get_by_role("button", name="Save the polynomial model").click()
        page.get_by_text("Saved to").wait_for(timeout=WAIT)
        visitor.check()
    assert (tmp_path / "kept/model.safetensors").exists()


def test_a_picture_goes_the_whole_way_in_the_dark(
    chromium: Any, named: Make, served: Make, rows: Make, tmp_path: Path
) -> None:
    made = named("vit", "vit-tiny-patch16-224", 4, [3, 5, 7])
    mine = tmp_path / "mine.png"
    rows("vit", 9)[8].save(mine)
    with served(made) as address:
        visitor = Visitor(chromium, address, "dark")
        page = visitor.page
        visitor.calibrate("poly3^16-l1")
        visitor.picture("vit.layers.3.attention, head 0")
        own = page.locator("#picture")
        own.get_by_label("Remove Image").or_(own.get_by_label("Clear")).first.click()
        page.locator("#picture input[type=file]").set_input_files(mine)
        page.get_by_label("Layer", exact=True).click()
        page.get_by_role("option", name="1:").click()
        visitor.picture("vit.layers.5.attention, head 0")
        page.get_by_role("radio", name="the first token's query").check()
        page.get_by_role("img", name="for 1 queries").wait_for(timeout=WAIT)
        visitor.keep("explorer-image")
        visitor.open("Outputs")
        page.get_by_role("columnheader", name="polynomial").wait_for(timeout=WAIT)
        visitor.check()


def test_it_can_be_used_from_the_keyboard_and_errors_are_said(chromium: Any, session: Make, served: Make) -> None:
    with served(session("gpt2-zinc", 4)) as address:
        visitor = Visitor(chromium, address, "light")
        page = visitor.page
        other = page.get_by_role("radio", name="another spec")
        other.press("Space")
        playwright.expect(other).to_be_checked()
        page.get_by_role("textbox", name="Another spec").press_sequentially("poly99")
        page.get_by_role("button", name="Calibrate", exact=True).press("Enter")
        alert = page.get_by_role("alert").filter(has_text="Grammar")
        alert.wait_for(timeout=WAIT)
        assert "poly99" in alert.inner_text()
        unnamed = page.locator("button:visible, input:visible, textarea:visible").evaluate_all(
            "all => all.filter(e => !(e.innerText || e.ariaLabel || e.title || (e.labels && e.labels.length) || "
            "e.getAttribute('aria-labelledby'))).map(e => e.outerHTML)"
        )
        assert unnamed == []
        visitor.check()
