"""The server: what is pressed is answered, on this machine only, with nothing from any other host."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from import_blocker import without

import hf_polyattn as hp
from hf_polyattn.explore import Session
from hf_polyattn.explore.answers import Answers, near_one
from hf_polyattn.explore.command import is_loopback
from hf_polyattn.explore.markup import answers_table, cards, short_name, status, title

pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[explore]'")
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def page(session: Make, served: Make) -> Iterator[tuple[Any, str]]:
    """A session of gpt2-zinc and the address of its page."""
    made = session("gpt2-zinc", 8)
    with served(made) as address:
        yield made, address


def get(address: str, **headers: str) -> Any:
    return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30)


def test_page_is_answered_by_gradio_s_own_client(page: tuple[Any, str], tmp_path: Path) -> None:
    from gradio_client import Client

    made, address = page
    client = Client(address, verbose=False)
    *shown, said = client.predict("poly3^16-l1", "", "\n".join(made.examples), api_name="/turn")
    assert "poly3^16-l1 is calibrated" in said
    assert re.search(
        r"<b>(0\.99\d\d|1 − \d\.\de-0[45])</b><span>agreement with softmax, on 2 examples that it", shown[1]
    )
    assert re.search(r'<p role="alert" class="error">\d+ rows a layer are too few', shown[1])
    assert "too few" not in said  # which the next sentence replaces
    assert shown[2].count("<svg") == 1
    maps, said = client.predict("CC(=O)Nc1ccc(O)cc1", 1, 0, -1, api_name="/map")
    assert 'role="img" aria-label="h.1.attn' in maps.replace("transformer.", "")
    code, said = client.predict(str(tmp_path / "kept"), api_name="/save")
    assert f"Saved to {tmp_path / 'kept'}" in said
    assert 'hp.patch_model(model, "poly3^16-l1")' in code
    assert (tmp_path / "kept/config.json").exists()


def test_enough_rows_are_no_warning(page: tuple[Any, str]) -> None:
    position = page[0].turn("poly4-l1", page[0].examples)
    enough = replace(position, report=replace(position.report, rows=10**6))
    assert "too few" in cards(position)
    assert "too few" not in cards(enough)


def test_an_error_is_a_sentence_on_the_page(page: tuple[Any, str]) -> None:
    from gradio_client import Client

    client = Client(page[1], verbose=False)
    *_, said = client.predict("another", "poly99", "CCO\nCCN", api_name="/turn")
    assert 'role="alert"' in said
    assert "Grammar" in said
    *_, said = client.predict(" ", api_name="/save")
    assert "name a folder" in said


def test_page_tells_the_browser_to_load_from_here_only(page: tuple[Any, str]) -> None:
    with get(page[1]) as answer:
        text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?://(?!127\.0\.0\.1)", text)
    assert "fonts.googleapis" not in text
    assert '"analytics_enabled":false' in text.replace(" ", "")


def test_a_page_of_another_site_gets_nothing(page: tuple[Any, str]) -> None:
    """Its name may point to 127.0.0.1; then its scripts reach this server under that name."""
    with pytest.raises(urllib.error.HTTPError, match="400"):
        get(page[1], Host="attacker.example")
    assert get(page[1], Host="localhost").status == 200


def test_a_model_has_the_name_that_tells_it_from_others(tmp_path: Path) -> None:
    for folder in ("demo/poly6-l1/model", "demo/poly3/checkpoint-100", "minilm-poly6"):
        (tmp_path / folder).mkdir(parents=True)
        expected = folder if "/" in folder else "minilm-poly6"
        assert short_name(str(tmp_path / folder)) == expected
    assert short_name("openai-community/gpt2") == "openai-community/gpt2"


def test_softmax_of_a_trained_model_is_said_to_be_its_own(session: Make, tmp_path: Path) -> None:
    made = session("gpt2-zinc", 1)
    assert "softmax with the weights of this folder" not in title(made)
    hp.patch_model(made.model, "poly3")
    again = Session(str(made.save(str(tmp_path / "model"))), "cpu")
    assert "softmax with the weights of this folder" in title(again)
    assert "polynomial: poly3, as it was saved" in title(again)


@pytest.mark.parametrize(("cosine", "said"), [(0.9961, "0.9961"), (1 - 7.5e-6, "1 − 7.5e-06"), (1.0, "1.0000")])
def test_a_cosine_near_one_keeps_its_digits(cosine: float, said: str) -> None:
    assert near_one(cosine) == said


def test_what_comes_from_elsewhere_is_escaped() -> None:
    attack = '<script>alert("x")</script>'
    assert "<script" not in answers_table(Answers(attack, (attack,), ((attack,),), attack))
    assert "<script" not in status(attack, error=True)


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("me", False)]
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


STARTED = """
import sys, threading, time
from hf_polyattn.explore import Session
from hf_polyattn.explore.command import serve
session = Session(sys.argv[1], "cpu")
started = time.process_time()
def ready(address):
    print(time.process_time() - started, address, flush=True)
    threading.Timer(0.1, sys.stdout.close).start()
    raise KeyboardInterrupt
try:
    serve(session, "127.0.0.1", 0, ready)
except KeyboardInterrupt:
    pass
"""


def test_server_starts_in_less_than_five_seconds_beyond_loading(checkpoint: Callable[[str], Path]) -> None:
    """Seconds of this process's own work: the machine of the tests is shared."""
    command = [sys.executable, "-c", STARTED, str(checkpoint("gpt2-zinc"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, address = done.stdout.split()
    assert float(seconds) < 5.0
    assert address.startswith("http://127.0.0.1:")


def test_without_gradio_it_says_what_to_install(checkpoint: Callable[[str], Path]) -> None:
    code = f"{without('gradio')}\nfrom hf_polyattn import cli\n"
    code += f"sys.argv[1:] = ['explore', {str(checkpoint('gpt2-zinc'))!r}]\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "polyattn: the explorer needs gradio: pip install 'hf_polyattn[explore]'" in done.stderr


def test_a_port_in_use_is_named(session: Make) -> None:
    import socket

    from hf_polyattn.explore.command import serve

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(hp.InputError, match=f"cannot listen on 127.0.0.1, port {port}"):
            serve(session("gpt2-zinc", 1), "127.0.0.1", port)
