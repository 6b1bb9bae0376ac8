"""The guard around Gradio's app: it restricts the senders, paths and values of requests.

There are two kinds of attackers. A website that the user visits can send requests to the viewer
from the user's browser. And everybody on the network can send requests to a viewer started with
--host 0.0.0.0. Gradio's server alone accepts uploads, fetches URLs from requests, and, on hosts
other than "localhost", lets every website read its responses. The viewer only answers requests that
are sent to its own host names, do not come from another website, use the paths of its own page, and
contain only texts and numbers.

Libraries do the rest: Starlette limits the size of a request, and the browser enforces `POLICY`.
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

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bilora_diffusion.core.errors import print_trace_if_asked, reason, strip_controls

# The paths that the page requests
OPEN_ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)"
    "|/(assets|static)/.*"
    r"|/gradio_api/(app_id|heartbeat/[^/]*|queue/data)"
)
# The paths to which the page sends events
EVENT_ROUTES = ("/gradio_api/queue/join", "/gradio_api/run/predict")
# Pattern of a Host header: a name or an IPv6 address in brackets, with or without a port
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^][:/@?#]+)(:\d+)?")
# Maximum size of a request's body; the page only sends choices and prompts.
MAX_BODY_BYTES = 100_000
# Maximum number of characters of a text in an event, such as a prompt
MAX_TEXT_LENGTH = 10_000
# Maximum number of characters of a line in the terminal
MAX_LINE_LENGTH = 400
# With this policy, the browser loads nothing from other servers and does not show the page inside
# another page. Gradio's page needs inline scripts and styles.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; object-src 'none';"
    " frame-ancestors 'none'; form-action 'none'; base-uri 'self'"
)
# Headers of every response to an accepted request
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def add_guards(
    app: ASGIApp,
    events: Collection[int],
    host: str,
    public: bool,
    allowed_hosts: Collection[str] = (),
) -> ASGIApp:
    """Put all guards around an application.

    Args:
        app: the application.
        events: numbers of the page's events.
        host: address that the server listens on.
        public: whether other machines may connect.
        allowed_hosts: additional host names of this server, such as the name of a proxy.
    """
    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    names |= {name.lower() for name in allowed_hosts}
    if public:
        names.add(socket.gethostname().lower())
    app = RequestBodyLimitMiddleware(EventGuard(app, events), MAX_BODY_BYTES)
    return PageGuard(app, names, accepts_addresses=public)


class PageGuard:
    """ASGI middleware that refuses other host names, websites and paths.

    The Host header of a request must be a name of this server, the Origin header must be absent or
    name the server's own page, and the page must need the path. `HEADERS` are added to each
    response of the application.

    Starlette's TrustedHostMiddleware can't replace the check of the host name: it has no option for
    all IP addresses, and its response does not mention --allow_host. Gradio's CORS check applies
    only to "localhost".

    Args:
        app: the application.
        names: host names of this server, in lower case.
        accepts_addresses: whether every IP address is accepted as a name of this server. A server
            in a container does not know its outside address.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], accepts_addresses: bool) -> None:
        self._app = app
        self._names = names
        self._accepts_addresses = accepts_addresses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        page_origins = (f"http://{host}", f"https://{host}")
        if not self._is_own_name(host):
            refusal = f"The viewer is not called {host!r}: start it with --allow_host NAME."
        elif any(origin.lower() not in page_origins for origin in headers.getlist("origin")):
            refusal = "The viewer only answers its own page."
        elif not _is_open(scope["method"], scope["path"]):
            refusal = "The viewer does not serve this path."
        else:
            await self._answer(scope, receive, send)
            return
        await PlainTextResponse(refusal, 403)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application; if it fails, print the error in one line.

        Errors occur after the browser has received its response or has left. Without this method,
        the server would print a traceback, whose message may contain anything the browser sent.
        """
        try:
            await self._app(scope, receive, _with_policy(send))
        except Exception as error:  # any exception, because the server must keep running
            line = f"a request failed: {type(error).__name__}: {reason(error)}"
            print(strip_controls(line), file=sys.stderr, flush=True)
            print_trace_if_asked(error)

    def _is_own_name(self, host: str) -> bool:
        """Return whether a Host header contains a name of this server.

        A website can point its own host name at this machine (DNS rebinding), but it can't do so
        with an IP address or a name of this server.
        """
        match = HOST.fullmatch(host)
        if match is None:
            return False
        name = match["name"].strip("[]")
        if self._accepts_addresses:
            with suppress(ValueError):
                ipaddress.ip_address(name)
                return True
        return name in self._names


def _is_open(method: str, path: str) -> bool:
    """Return whether the page requests a path with this method."""
    if method == "POST":
        return path in EVENT_ROUTES
    return method in ("GET", "HEAD") and OPEN_ROUTES.fullmatch(path) is not None


class EventGuard:
    """ASGI middleware that refuses events that the page does not send.

    The page sends texts, numbers, and lists of them. Gradio may interpret an object as a file on
    the server or as a URL, and reads it before the event's function gets the values. Gradio itself
    refuses files that the page does not serve, but it has no setting to refuse URLs.

    Args:
        app: the application.
        events: numbers of the page's events.
    """

    def __init__(self, app: ASGIApp, events: Collection[int]) -> None:
        self._app = app
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application; check the values of an event first."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        refusal = self._refusal(body)
        if refusal is not None:
            # The page shows the value of "detail".
            await JSONResponse({"detail": refusal}, 400)(scope, receive, send)
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, receive_again, send)

    def _refusal(self, body: bytes) -> str | None:
        """Return the reason to refuse an event, given its body; None to accept it."""
        try:
            event = json.loads(body)  # as in FastAPI
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            return "An event must be a JSON object."
        number = event.get("fn_index")
        if not isinstance(number, int) or number not in self._events:
            return "The page has no such event: load the page again."
        # Only the data of a click may be an object, such as {"prompt": 3}.
        event_data = event.get("event_data")
        if isinstance(event_data, dict) and all(map(_is_number, event_data.values())):
            del event["event_data"]
        values = list(event.values())
        while values:
            value = values.pop()
            if isinstance(value, list):
                values += value
            elif isinstance(value, dict):
                return "The values of an event must be strings and numbers, not files."
            elif isinstance(value, str) and len(value) > MAX_TEXT_LENGTH:
                return f"A text has {len(value):,} characters: use at most {MAX_TEXT_LENGTH:,}."
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _with_policy(send: Send) -> Send:
    """Wrap an ASGI `send` so that it adds `HEADERS` to the response."""

    async def send_with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return send_with_policy


class ShortLines(io.TextIOBase):
    """A stream for the terminal that shortens lines and removes control characters.

    When an event fails, Gradio prints a traceback with the values that a visitor sent. These may be
    long, and control characters in them could manipulate the terminal's display. Gradio has no
    setting to prevent this.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; each line is cut to `MAX_LINE_LENGTH` characters."""
        lines = [strip_controls(line[:MAX_LINE_LENGTH]) for line in text.split("\n")]
        self._stream.write("\n".join(lines))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()
