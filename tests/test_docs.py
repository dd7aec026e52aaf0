"""The documentation is built without a warning, loads nothing from elsewhere, and its code runs."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(?P<language>python|bash)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "# not run here"  # the first line of a block that needs what a test has not, and what it needs
SMALLER = {  # stands in for what the pages name
    "openai-community/gpt2": "gpt2-tinystories",
    "sentence-transformers/all-MiniLM-L6-v2": "minilm",
}
DATA = {
    "roneneldan/TinyStories": "datasets/tinystories",
    "stanfordnlp/sst2": "datasets/sst2",
    "uoft-cs/cifar10": "datasets/cifar10",
    "Salesforce/wikitext": "datasets/tinystories",
}
SHORTER = {
    "train[:256]": "train[:24]",
    "len(sentences), 32": "len(sentences), 9",
    "i : i + 32": "i : i + 9",
    "train[:64]": "train[:8]",
    "range(0, len(texts), 8)": "range(0, len(texts), 4)",
    "i : i + 8": "i : i + 4",
    'train[:2000]"), 200, 32': 'train[:64]"), 4, 8',
    "steps=600": "steps=2",
}


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in BLOCK.finditer((DOCS / page).read_text()):
            if block["language"] == language:
                yield page, block["code"]


PYTHON = {page: [code for name, code in blocks("python") if name == page] for page, _ in blocks("python")}
COMMANDS = [line.replace("\\\n", " ") for _, code in blocks("bash") for line in re.split(r"(?<!\\)\n", code.strip())]


@pytest.fixture
def local(shorter: Callable[[str], Path], shared: Callable[[str], Path]) -> Callable[[str], str]:
    """Puts local paths in the place of Hub names, and takes fewer rows."""
    names = {name: str(shared(folder)) for name, folder in DATA.items()}
    names |= {name: str(shorter(small)) for name, small in SMALLER.items()}

    def replace(text: str) -> str:
        for name, small in {**names, **SHORTER}.items():
            text = text.replace(name, small)
        return text

    return replace


@pytest.mark.parametrize("page", PYTHON)
def test_code_of_a_page_runs_from_top_to_bottom(
    page: str, local: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page}
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore", UserWarning)  # of the few rows that tests take
        for code in PYTHON[page]:
            if not code.startswith(NOT_RUN):
                exec(compile(local(code), page, "exec"), names)


def test_every_page_with_code_is_seen_and_little_is_left_out() -> None:
    codes = [code for page in PYTHON.values() for code in page]
    assert len(codes) > 15
    assert sum(code.startswith(NOT_RUN) for code in codes) == 1
    assert {"guides/convert.md", "guides/when-quality-drops.md", "index.md"} <= set(PYTHON)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_what_there_is(command: str) -> None:
    """Commands that compute are run by the tests of the recipes and of the command line; here their words are read."""
    words = shlex.split(command)
    if words[0] == "polyattn":
        help_ = subprocess.run(
            [sys.executable, "-m", "hf_polyattn", words[1], "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "TERMINAL_WIDTH": "200", "COLUMNS": "200"},
        ).stdout
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
        return
    elif words[0] == "python":  # the recipe in an environment of its own
        help_ = subprocess.run(
            [sys.executable, *words[1:]], capture_output=True, text=True, check=True, cwd=ROOT
        ).stdout
    else:
        assert words[:2] == ["accelerate", "launch"]
        help_ = (ROOT / words[2]).read_text()
        for part in (ROOT / "recipes/parts").glob("*.py"):
            help_ += part.read_text()
        help_ = help_.replace("_", "-") + "max-steps output-dir"
    for word in words:
        if word.startswith("--"):
            assert word.removeprefix("--").replace("_", "-") in help_, word


def test_figures_in_the_text_are_generated() -> None:
    """Tables of measured figures come from the JSON files when the pages are built, never from hand."""
    for page in PAGES:
        text = BLOCK.sub("", (DOCS / page).read_text())
        if page == "private_inference.md":  # held to its JSON by tests/recipes/test_private_inference.py
            continue
        assert not re.findall(r"\|[^|\n]*\b0\.\d{3,}", text), page


# ---------------------------------------------------------------- the built site


class Links(HTMLParser):
    """What a page loads and where it leads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.led: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(str(given["src"]))
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next") and given.get("href"):
            self.loaded.append(str(given["href"]))
        if tag == "a" and given.get("href"):
            self.led.append(str(given["href"]))
        if tag == "img":
            self.pictures.append(given)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocstrings", reason="needs pip install -e '.[docs]'; make docs installs it")
    output = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) == len(PAGES)
    assert not list(site.rglob("*.py"))  # what builds the pages
    for page in pages:
        links = Links(page)
        assert links.loaded
        assert not [link for link in links.loaded if "//" in link], page
        for link in links.loaded:
            assert (page.parent / link.partition("?")[0]).exists(), (page, link)


def test_pictures_are_described_and_stand_in_one_place(site: Path) -> None:
    pictures = [picture for page in site.rglob("*.html") for picture in Links(page).pictures]
    assert len(pictures) >= 5
    assert all(len(picture["alt"] or "") > 20 for picture in pictures)
    sources = [(picture["src"] or "").lstrip("./") for picture in pictures]
    assert len(sources) == len(set(sources))


def test_results_are_those_of_the_files(site: Path) -> None:
    text = (site / "results.html").read_text()
    minilm = json.loads((ROOT / "benchmarks/calibration.json").read_text())["checkpoints"]["minilm"]
    assert f"<td>{1.0 - minilm['poly3']['cosine']:.1e}</td>" in text
    assert "<!-- table" not in text
    guide = (site / "guides/from-scratch.html").read_text()
    for name, measure in (("vit", "accuracy"), ("lm", "nll"), ("translation", "bleu")):
        value = json.loads((ROOT / f"model_cards/from-scratch-{name}.json").read_text())["summary"]["paper"][measure]
        assert f"<td>{value['mean']:.4f}" in guide


def test_a_broken_link_is_an_error(site: Path, tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    for folder in ("benchmarks", "model_cards", "hf_polyattn", "mkdocs.yml"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "mkdocs.yml").unlink()
    (tmp_path / "mkdocs.yml").write_text((ROOT / "mkdocs.yml").read_text())
    index = tmp_path / "docs/index.md"
    index.write_text(index.read_text().replace("guides/deploy.md", "guides/nowhere.md"))
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "guides/nowhere.md" in done.stderr


def test_every_page_opens_in_chromium_without_an_error(site: Path) -> None:
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, driver.sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        complaints: list[str] = []
        asked: list[str] = []
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        for name in PAGES:
            page.goto(address + name.replace(".md", ".html"))
            assert page.locator("h1").count() == 1, name
            if (folder := os.environ.get("POLYATTN_SCREENSHOTS")) and name in ("index.md", "results.md", "api.md"):
                page.screenshot(path=Path(folder) / f"docs-{Path(name).stem}.png")
        page.goto(address + "no-such-page.html")
        assert len(complaints) == 1, complaints  # the control: that page is not there
        assert "404" in complaints[0]
        browser.close()
        server.shutdown()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_: Any) -> None:
        pass
