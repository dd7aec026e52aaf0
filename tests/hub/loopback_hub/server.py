"""The loopback Hub: two servers, the Hub and, beside it on another port and so as another origin, the storage."""

from __future__ import annotations

import re
import threading
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from .store import Store


@dataclass(frozen=True, slots=True)
class Request:
    """An entry of the log. `status` is 0 where the connection was broken."""

    server: str
    method: str
    path: str
    authorized: bool
    status: int


@dataclass(slots=True)
class Breakage:
    """Connections to break in the middle of a request's body: those of these numbers among the ones that match."""

    method: str
    path: re.Pattern[str]
    numbers: Container[int]
    seen: int = 0

    def is_next(self, method: str, path: str) -> bool:
        """Whether a connection is to be broken; counts it."""
        if method != self.method or not self.path.search(path):
            return False
        self.seen += 1
        return self.seen in self.numbers


@dataclass(slots=True)
class LoopbackHub:
    """A Hub at `endpoint` while the `with` block runs.

    Attributes:
        users: names by token.
        store: what it holds.
        requests: all requests in the order of their answers.
    """

    users: Mapping[str, str]
    store: Store = field(init=False)
    requests: list[Request] = field(default_factory=list)
    breakages: list[Breakage] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    _servers: list[ThreadingHTTPServer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = Store(self.users)

    def __enter__(self) -> LoopbackHub:
        from .handlers import StorageHandler
        from .routes import HubHandler

        for handler in (HubHandler, StorageHandler):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": self}))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage(self) -> str:
        # Clients before huggingface_hub 2 take another port of the same host for the same origin.
        return f"http://localhost:{self._servers[1].server_port}"

    def environment(self, token: str | None, home: Path) -> dict[str, str]:
        """Returns the variables under which a new process uses this Hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token or "",
        }

    def break_connections(self, method: str, path: str, numbers: Container[int]) -> None:
        """Breaks connections whose path matches, counted from 1 and from now, once half of the body has come."""
        self.breakages.append(Breakage(method, re.compile(path), numbers))

    def take_requests(self) -> list[Request]:
        """Returns the requests since it was last called."""
        with self.lock:
            taken, self.requests = self.requests, []
        return taken
