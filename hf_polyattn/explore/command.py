"""The server of the explorer: on this machine only unless asked, and with nothing from any other host."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

from ..errors import InputError
from .session import Session

#: What a browser may load: everything from here, nothing from elsewhere.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)


def serve(session: Session, host: str, port: int, ready: Any = print) -> None:
    """Serves the page until it is interrupted.

    Args:
        session: to explore.
        host: address to listen on.
        port: 0 takes a free one.
        ready: is told the address once the server listens.

    Raises:
        InputError: gradio is not installed, or nobody can listen there.
    """
    application = make_application(session, host)
    import uvicorn

    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"cannot listen on {host}, port {port}: {error}; choose another with --port") from error
    with listening:
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listening.getsockname()[1]}/")
        server = uvicorn.Server(uvicorn.Config(application, log_level="warning", ws="none"))
        server.run(sockets=[listening])


def make_application(session: Session, host: str) -> Any:
    """Returns the web application of a session, which answers to the names of this host only.

    Raises:
        InputError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("GRADIO_SSR_MODE", "False")
    try:
        import gradio
        from fastapi import FastAPI
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from .page import build, theme
    except ImportError as error:
        raise InputError(f"the explorer needs gradio: pip install 'hf_polyattn[explore]' ({error})") from None
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @application.middleware("http")  # type: ignore[untyped-decorator]
    async def keep_to_this_host(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    if is_loopback(host):  # a page of another site, whose name points here, gets nothing
        application.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1"])
    return gradio.mount_gradio_app(
        application,
        build(session),
        path="/",
        theme=theme(),
        css_paths=Path(__file__).with_name("page.css"),
        footer_links=[],
        show_error=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
    )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
