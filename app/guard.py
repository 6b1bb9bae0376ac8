"""Guard of the viewer's server: it refuses pages of others, routes that its page does not ask for,
large bodies, and downloads.

Gradio's server also takes files, fetches the addresses that it is sent, and on any host but
"localhost" lets every web site read its answers.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import sys
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any, NoReturn

import safehttpx
from gradio import queueing, routes
from gradio.utils import get_upload_folder
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from bilora_diffusion.core.errors import print_trace_if_asked, reason, strip_controls

OPEN = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)"
    "|/(assets|static|svelte)/.*"
    r"|/gradio_api/(app_id|theme\.css|cancel|reset/?|heartbeat/[^/]*)"
    "|/gradio_api/(queue/(join|data)|run/predict)"
)
"""The routes that the page asks for; files are served from Gradio's own folder besides."""
MAX_BODY_BYTES = 1_000_000
"""Largest body of a request. The page sends choices and prompts; uploads are closed."""
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; object-src 'none';"
    " frame-ancestors 'none'; form-action 'none'; base-uri 'self'"
)
"""The browser itself then refuses whatever is not from this server, and to show the page in
another. Gradio's page needs inline scripts and styles."""
HEADERS = {
    **{"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"},
    **{"Referrer-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin"},
}
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]+)?")


class Guard:
    """ASGI application: answers what may be asked by another, with the policy above.

    Args:
        app: the other.
        host: that it listens on.
        public: whether other machines may ask.
        allowed_hosts: other names of this server, such as a proxy's.
    """

    def __init__(
        self, app: ASGIApp, host: str, public: bool, allowed_hosts: Collection[str] = ()
    ) -> None:
        self._app, self._public = app, public
        self._names = {"localhost", "127.0.0.1", "::1", host.lower()}
        self._names |= {name.lower() for name in allowed_hosts}
        self._names |= {socket.gethostname().lower()} if public else set()
        self._files = f"/gradio_api/file={get_upload_folder()}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":  # the page opens none
            await WebSocketClose()(scope, receive, send)
        elif refusal := self._refusal(scope):
            sentence, status = refusal
            await PlainTextResponse(sentence, status)(scope, receive, send)
        else:
            await self._answer(scope, receive, _with_policy(send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception as error:  # the browser has its answer already: 500, or it left
            print_failure(error.__cause__ or error)

    def _refusal(self, scope: Scope) -> tuple[str, int] | None:
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        match = _HOST.fullmatch(host)
        # A web site can let its own name lead to this machine, but no address and no name of ours.
        if match is None or not self._is_ours(match[1].strip("[]")):
            return f"The viewer is not called {host!r}: start it with --allow_host NAME.", 403
        if any(one.lower() not in (f"http://{host}", f"https://{host}") for one in origins):
            return "The viewer answers no page but its own.", 403
        path = scope["path"]
        if not OPEN.fullmatch(path) and not path.startswith(self._files):
            return "This is closed.", 403
        if "transfer-encoding" in headers:  # a body that may be endless
            return "The viewer reads no body without a Content-Length.", 411
        # The server below has refused a length that is no number or not the body's.
        if int(headers.get("content-length", 0)) > MAX_BODY_BYTES:
            return f"The viewer reads at most {MAX_BODY_BYTES} bytes.", 413
        return None

    def _is_ours(self, name: str) -> bool:
        if self._public:
            with contextlib.suppress(ValueError):
                ipaddress.ip_address(name)
                return True
        return name in self._names


def _with_policy(send: Send) -> Send:
    async def answer(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return answer


def print_failure(error: BaseException) -> None:
    """Print an error as one short line: its message may repeat what a browser sent."""
    line = f"a request failed: {type(error).__name__}: {reason(error)}"
    print(strip_controls(line), file=sys.stderr, flush=True)
    print_trace_if_asked(error)


def shorten_tracebacks() -> None:
    """Print the error of an event by :func:`print_failure` where Gradio prints its trace."""

    def print_exc() -> None:
        error = sys.exception()
        if error is not None:
            print_failure(error)

    modules: tuple[Any, ...] = (queueing, routes)
    for module in modules:
        module.traceback = SimpleNamespace(print_exc=print_exc)


def close_downloads() -> None:
    """Take away the client by which Gradio fetches addresses, also of files that events name."""

    async def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ValueError("the viewer fetches nothing")

    safehttpx.get = safehttpx.async_validate_url = refuse
