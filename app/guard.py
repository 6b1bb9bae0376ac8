"""Guard of the viewer's server: it answers to its own names and its own page, on the page's routes.

Gradio's server also takes files, fetches the addresses that it is sent, and on any host but
"localhost" lets every web site read its answers.
"""

from __future__ import annotations

import io
import ipaddress
import re
import socket
import sys
from collections.abc import Collection
from contextlib import suppress
from typing import TextIO

from gradio.utils import get_upload_folder
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bilora_diffusion.core.errors import print_trace_if_asked, reason, strip_controls

OPEN_ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)"
    "|/(assets|static|svelte)/.*"
    r"|/gradio_api/(app_id|theme\.css|cancel|reset/?|heartbeat/[^/]*)"
    "|/gradio_api/(queue/(join|data)|run/predict)"
)
"""The routes that the page asks for; files are served from Gradio's own folder besides."""
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^][:/@?#]+)(:\d+)?")
MAX_BODY_BYTES = 1_000_000
"""Largest body of a request. The page sends choices and prompts; uploads are closed."""
MAX_LINE_LENGTH = 400
"""Longest line at the terminal, in characters."""
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; object-src 'none';"
    " frame-ancestors 'none'; form-action 'none'; base-uri 'self'"
)
"""The browser itself then refuses whatever is not from this server, and to show the page in
another. Gradio's page needs inline scripts and styles."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def guarded(app: ASGIApp, host: str, public: bool, allowed_hosts: Collection[str] = ()) -> ASGIApp:
    """The application ``app`` behind all guards.

    Args:
        host: that it listens on.
        public: whether other machines may ask.
        allowed_hosts: other names of this server, such as a proxy's.
    """
    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    names |= {name.lower() for name in allowed_hosts}
    if public:
        names.add(socket.gethostname().lower())
    guard = PageGuard(app, names, answers_addresses=public)
    return RequestBodyLimitMiddleware(guard, MAX_BODY_BYTES)


class PageGuard:
    """ASGI middleware: no name that is not this server's, no page of others, no route that the own
    page does not ask for, and the policy on every answer.

    Args:
        names: host names in lower case.
        answers_addresses: whether any address in digits is taken for this server's. Starlette's
            TrustedHostMiddleware can't say that, and behind a container's port the server does not
            know the address that it is reached by.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], answers_addresses: bool) -> None:
        self._app = app
        self._names = names
        self._answers_addresses = answers_addresses
        self._files = f"/gradio_api/file={get_upload_folder()}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        own_origins = (f"http://{host}", f"https://{host}")
        path = scope["path"]
        if not self._is_our_name(host):
            refusal = f"The viewer is not called {host!r}: start it with --allow_host NAME."
        elif any(origin.lower() not in own_origins for origin in headers.getlist("origin")):
            refusal = "The viewer answers no page but its own."
        elif not OPEN_ROUTES.fullmatch(path) and not path.startswith(self._files):
            refusal = "This is closed."
        else:
            await self._answer(scope, receive, send)
            return
        await PlainTextResponse(refusal, 403)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and print in one line what fails in it.

        The browser has its answer by then, or has left. The server would print a traceback, and an
        error's message may repeat all that a browser sent.
        """
        try:
            await self._app(scope, receive, _with_policy(send))
        except Exception as error:  # whatever Gradio raises; the next request is to be answered
            line = f"a request failed: {type(error).__name__}: {reason(error)}"
            print(strip_controls(line), file=sys.stderr, flush=True)
            print_trace_if_asked(error)

    def _is_our_name(self, host: str) -> bool:
        """Test a Host header. A web site can let its own name lead to this machine, but no address
        and no name of ours.
        """
        match = HOST.fullmatch(host)
        if match is None:
            return False
        name = match["name"].strip("[]")
        if self._answers_addresses:
            with suppress(ValueError):
                ipaddress.ip_address(name)
                return True
        return name in self._names


def _with_policy(send: Send) -> Send:
    async def send_with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return send_with_policy


class ShortLines(io.TextIOBase):
    """Text without control characters and with short lines, for the terminal.

    Gradio prints the trace of an event that fails, and with it all that a browser sent.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the lines of a text, each cut at its limit."""
        lines = [strip_controls(line[:MAX_LINE_LENGTH]) for line in text.split("\n")]
        self._stream.write("\n".join(lines))
        return len(text)

    def flush(self) -> None:
        """Write what waits in a buffer."""
        self._stream.flush()
