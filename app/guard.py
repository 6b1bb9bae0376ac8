"""The guard around Gradio's app: who may ask, for which addresses, and with which values.

Gradio's server also takes files, fetches the addresses that it is sent, and on any host but
"localhost" lets every web site read its answers. The viewer answers to its own names and its own
page, on the page's addresses, and takes texts and numbers only.
"""

from __future__ import annotations

import io
import ipaddress
import json
import re
import socket
import sys
from collections.abc import Collection
from contextlib import suppress
from typing import Any, TextIO

from gradio.utils import get_upload_folder
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bilora_diffusion.core.errors import print_trace_if_asked, reason, strip_controls

# The addresses that the page asks for, besides files of Gradio's cache.
OPEN_ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)"
    "|/(assets|static)/.*"
    r"|/gradio_api/(app_id|heartbeat/[^/]*|queue/data)"
)
# The addresses to which the page sends events.
EVENT_ROUTES = ("/gradio_api/queue/join", "/gradio_api/run/predict")
# A Host header: a name, or an IPv6 address in brackets, and perhaps a port.
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^][:/@?#]+)(:\d+)?")
# Largest body of a request. The page sends choices and prompts only.
MAX_BODY_BYTES = 100_000
# Longest text of an event, such as a prompt.
MAX_TEXT_LENGTH = 10_000
# Longest line at the terminal, in characters.
MAX_LINE_LENGTH = 400
# By this policy the browser itself refuses content from other servers, and refuses to show the page
# inside another one. Gradio's page needs inline scripts and styles.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; object-src 'none';"
    " frame-ancestors 'none'; form-action 'none'; base-uri 'self'"
)
# Of every answer
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def guarded(
    app: ASGIApp,
    events: Collection[int],
    host: str,
    public: bool,
    allowed_hosts: Collection[str] = (),
) -> ASGIApp:
    """Put an application behind all guards.

    Args:
        app: the application.
        events: numbers of the page's events.
        host: address that it listens on.
        public: True if other machines may look.
        allowed_hosts: further names of this server, such as a proxy's.
    """
    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    names |= {name.lower() for name in allowed_hosts}
    if public:
        names.add(socket.gethostname().lower())
    app = RequestBodyLimitMiddleware(EventGuard(app, events), MAX_BODY_BYTES)
    return PageGuard(app, names, answers_addresses=public)


class PageGuard:
    """ASGI middleware that refuses foreign names, foreign pages and closed addresses.

    A request must be addressed to one of this server's names, come from its own page, and ask for
    an address that this page needs. Each answer has the policy for the browser.

    Args:
        app: the application.
        names: host names of this server, in lower case.
        answers_addresses: True if every IP address counts as this server's: behind the port of a
            container the server does not know its own. Starlette's TrustedHostMiddleware has no
            such setting.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], answers_addresses: bool) -> None:
        self._app = app
        self._names = names
        self._answers_addresses = answers_addresses
        self._files = f"/gradio_api/file={get_upload_folder()}/"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        page_origins = (f"http://{host}", f"https://{host}")
        if not self._is_own_name(host):
            refusal = f"The viewer is not called {host!r}: start it with --allow_host NAME."
        elif any(origin.lower() not in page_origins for origin in headers.getlist("origin")):
            refusal = "The viewer answers no page but its own."
        elif not self._is_open(scope["method"], scope["path"]):
            refusal = "The viewer does not serve this address."
        else:
            await self._answer(scope, receive, send)
            return
        await PlainTextResponse(refusal, 403)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and print an error in it as one line.

        By then the browser has its answer or has left. The server itself would print a traceback,
        and the message may repeat everything that the browser sent.
        """
        try:
            await self._app(scope, receive, _with_policy(send))
        except Exception as error:  # of any kind, since the next request must be answered
            line = f"a request failed: {type(error).__name__}: {reason(error)}"
            print(strip_controls(line), file=sys.stderr, flush=True)
            print_trace_if_asked(error)

    def _is_open(self, method: str, path: str) -> bool:
        """Test that the page asks for an address by this method."""
        if method == "POST":
            return path in EVENT_ROUTES
        is_read = method in ("GET", "HEAD")
        return is_read and bool(OPEN_ROUTES.fullmatch(path) or path.startswith(self._files))

    def _is_own_name(self, host: str) -> bool:
        """Test that a Host header has a name of this server.

        A web site can make its own name lead to this machine (DNS rebinding), but not a name or an
        address of this server.
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


class EventGuard:
    """ASGI middleware that refuses events which the page does not send.

    The page sends texts, numbers, and lists of these. In an object Gradio may see a file of the
    server or a web address, which it reads before the event's function gets the values.

    Args:
        app: the application.
        events: numbers of the page's events.
    """

    def __init__(self, app: ASGIApp, events: Collection[int]) -> None:
        self._app = app
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on one request; an event only after its values."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        refusal = self._refusal(body)
        if refusal is not None:
            # The page shows the detail.
            await JSONResponse({"detail": refusal}, 400)(scope, receive, send)
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, receive_again, send)

    def _refusal(self, body: bytes) -> str | None:
        """The sentence that refuses the body of an event; None for an event of the page."""
        try:
            event = json.loads(body)  # as FastAPI reads it
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            return "An event is a JSON object."
        number = event.get("fn_index")
        if not isinstance(number, int) or number not in self._events:
            return "The page has no such event: load it again."
        # Only the data of a click are an object: {"prompt": 3}.
        event_data = event.get("event_data")
        if isinstance(event_data, dict) and all(map(_is_number, event_data.values())):
            del event["event_data"]
        values = list(event.values())
        while values:
            value = values.pop()
            if isinstance(value, list):
                values += value
            elif isinstance(value, dict):
                return "The values of an event are texts and numbers: the viewer takes no files."
            elif isinstance(value, str) and len(value) > MAX_TEXT_LENGTH:
                return f"A text has {len(value):,} characters: give at most {MAX_TEXT_LENGTH:,}."
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _with_policy(send: Send) -> Send:
    """An ASGI `send` that adds the policy to the headers."""

    async def send_with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return send_with_policy


class ShortLines(io.TextIOBase):
    """A stream for the terminal that shortens lines and removes control characters.

    Gradio prints the traceback of an event that fails, and with it everything that a browser sent.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the lines of a text, each cut at its limit."""
        lines = [strip_controls(line[:MAX_LINE_LENGTH]) for line in text.split("\n")]
        self._stream.write("\n".join(lines))
        return len(text)

    def flush(self) -> None:
        """Write the buffer of the stream."""
        self._stream.flush()
