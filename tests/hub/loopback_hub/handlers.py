"""What both servers of the loopback Hub do with a connection, and the storage server."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any

from .server import LoopbackHub, Request
from .store import HubError


class BrokenError(Exception):
    """The connection is to be broken now."""


class Handler(BaseHTTPRequestHandler):
    """What both servers share: bodies, answers and the log."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub
    name = ""

    def handle_request(self) -> None:
        try:
            self.body = self.read_body()
            with self.hub.lock:
                self.respond()
        except HubError as error:
            headers = {"X-Error-Message": str(error)}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            headers |= {"X-Repo-Commit": error.commit} if error.commit else {}
            self.answer(error.status, {"error": str(error), **self.beside_error()}, headers)
        except BrokenError:
            self.log(0)
            self.close_connection = True
            self.connection.shutdown(2)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

    def respond(self) -> None:
        raise NotImplementedError

    def beside_error(self) -> dict[str, Any]:
        return {}

    def read_body(self) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        with self.hub.lock:
            broken = [breakage.is_next(self.command, self.path) for breakage in self.hub.breakages]
        if any(broken):
            self.rfile.read(length // 2)
            raise BrokenError
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, content: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        """Sends bytes, or anything else as JSON; to HEAD the headers only."""
        headers = dict(headers or {})
        if not isinstance(content, bytes):
            content, headers["Content-Type"] = json.dumps(content).encode(), "application/json"
        self.log(status)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_part(self, content: bytes, headers: Mapping[str, str]) -> None:
        """Sends a file, or the part of it that a Range header asks for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.answer(200, content, {"Accept-Ranges": "bytes", **headers})
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        if first > last:
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        part = {"Content-Range": f"bytes {first}-{last}/{len(content)}", **headers}
        return self.answer(206, content[first : last + 1], part)

    def log(self, status: int) -> None:
        authorized = "Authorization" in self.headers
        with self.hub.lock:
            self.hub.requests.append(Request(self.name, self.command, self.path, authorized, status))

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: the log is `hub.requests`."""


class StorageHandler(Handler):
    """Large objects by name. It is another origin, which no client may send its token to."""

    name = "storage"

    def respond(self) -> None:
        oid = self.path.removeprefix("/")
        if "Authorization" in self.headers:
            raise HubError(400, "a token was sent to another origin")
        if self.command == "PUT":
            self.hub.store.uploaded[oid] = self.body
            return self.answer(200, headers={"ETag": f'"{oid}"'})
        if self.command not in ("GET", "HEAD") or oid not in self.hub.store.objects:
            raise HubError(404, f"no object {oid}")
        return self.answer_part(self.hub.store.objects[oid], {"ETag": f'"{oid}"'})
