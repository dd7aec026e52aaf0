"""Sessions and servers of the explorer on real checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hf_polyattn.explore import Session


@pytest.fixture(scope="session")
def session(checkpoint: Callable[[str], Path], rows: Callable[..., list[Any]]) -> Callable[..., Session]:
    """`session(name, count)`: a fresh session of a checkpoint with so many real examples."""

    def make(name: str, count: int) -> Session:
        return Session(str(checkpoint(name)), "cpu", [one[:200] if name != "vit" else one for one in rows(name, count)])

    return make


@pytest.fixture(scope="session")
def served() -> Callable[..., Any]:
    """`with served(session) as address:` serves a page on a free port of this machine."""

    @contextmanager
    def serve(session: Session) -> Iterator[str]:
        pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[explore]'")
        import socket

        import uvicorn

        from hf_polyattn.explore.command import make_application

        with socket.create_server(("127.0.0.1", 0)) as listening:
            application = make_application(session, "127.0.0.1")
            server = uvicorn.Server(uvicorn.Config(application, log_level="warning", ws="none"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
            thread.start()
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
            finally:
                server.should_exit = True
                thread.join(10)

    return serve
