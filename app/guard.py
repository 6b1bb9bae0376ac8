"""The guard around Gradio's app: it limits senders, paths and values of requests.

There are two attackers. A web site that the user visits can send requests to the viewer from the
user's browser. And everybody in the network can send requests to a viewer that is started with
--host 0.0.0.0. Gradio's server alone accepts uploads, fetches URLs that it is sent, and on hosts
other than "localhost" lets every web site read its responses. The viewer only answers requests to
its own host names, from its own page, for the paths of this page, and with texts and numbers.

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
# A Host header: a name, or an IPv6 address in brackets, with or without a port
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^][:/@?#]+)(:\d+)?")
# Largest body of a request; the page only sends choices and prompts.
MAX_BODY_BYTES = 100_000
# Longest text of an event, such as a prompt
MAX_TEXT_LENGTH = 10_000
# Longest line in the terminal, in characters
MAX_LINE_LENGTH = 400
# With this policy the browser loads nothing from other servers, and shows the page inside no other
# page. Gradio's page needs inline scripts and styles.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; object-src 'none';"
    " frame-ancestors 'none'; form-action 'none'; base-uri 'self'"
)
# Headers of every answered request
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
        allowed_hosts: more host names of this server, such as the name of a proxy.
    """
    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    names |= {name.lower() for name in allowed_hosts}
    if public:
        names.add(socket.gethostname().lower())
    app = RequestBodyLimitMiddleware(EventGuard(app, events), MAX_BODY_BYTES)
    return PageGuard(app, names, accepts_addresses=public)


class PageGuard:
    """ASGI middleware that refuses other host names, other web sites and other paths.

    A request must name a host name of this server, come from its own page, and be for a path that
    the page needs. `POLICY` is added to each response.

    Starlette's TrustedHostMiddleware can't replace the check of the host name: it accepts no set of
    all IP addresses, and its response does not say that --allow_host adds a name. Gradio's CORS
    check applies to "localhost" only.

    Args:
        app: the application.
        names: host names of this server, in lower case.
        accepts_addresses: whether every IP address is a name of this server. A server in a
            container does not know its address outside of it.
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
        """Pass a request to the application, and print an error in one line.

        The error comes after the browser has got its response or has left. The server would print
        a traceback, and the message may contain everything that the browser sent.
        """
        try:
            await self._app(scope, receive, _with_policy(send))
        except Exception as error:  # of any kind, because the next request must be answered
            line = f"a request failed: {type(error).__name__}: {reason(error)}"
            print(strip_controls(line), file=sys.stderr, flush=True)
            print_trace_if_asked(error)

    def _is_own_name(self, host: str) -> bool:
        """Test whether a Host header has a name of this server.

        A web site can point its own host name at this machine (DNS rebinding), but it can't do this
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
    """Test whether the page requests a path by this method."""
    if method == "POST":
        return path in EVENT_ROUTES
    return method in ("GET", "HEAD") and OPEN_ROUTES.fullmatch(path) is not None


class EventGuard:
    """ASGI middleware that refuses events that the page does not send.

    The page sends texts, numbers, and lists of them. Gradio may take an object for a file of the
    server or a URL, and reads these before the function of the event gets the values. Gradio
    refuses other files of the server itself, but has no setting that refuses URLs.

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
        """The sentence that refuses an event by its body; None for an event of the page."""
        try:
            event = json.loads(body)  # as in FastAPI
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            return "An event must be a JSON object."
        number = event.get("fn_index")
        if not isinstance(number, int) or number not in self._events:
            return "The page has no such event: load the page again."
        # Only the data of a click is an object, such as {"prompt": 3}.
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
                return f"A text has {len(value):,} characters: give at most {MAX_TEXT_LENGTH:,}."
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _with_policy(send: Send) -> Send:
    """An ASGI `send` that adds `HEADERS` to the response."""

    async def send_with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return send_with_policy


class ShortLines(io.TextIOBase):
    """A stream for the terminal that shortens lines and removes control characters.

    When an event fails, Gradio prints a traceback with the values that a visitor sent. They may be
    long, and control characters could change what the terminal shows. Gradio has no setting for it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, with at most `MAX_LINE_LENGTH` characters of each line."""
        lines = [strip_controls(line[:MAX_LINE_LENGTH]) for line in text.split("\n")]
        self._stream.write("\n".join(lines))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()
