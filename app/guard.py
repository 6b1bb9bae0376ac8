"""Guard of the viewer's server: it refuses pages of others, routes that its page does not ask for,
and downloads.

Gradio's server also takes files, fetches the addresses that it is sent, and on any host but
"localhost" lets every web site read its answers.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import safehttpx
from gradio.utils import get_upload_folder
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

OPEN = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)"
    "|/(assets|static|svelte)/.*"
    r"|/gradio_api/(app_id|theme\.css|cancel|reset/?|heartbeat/[^/]*)"
    "|/gradio_api/(queue/(join|data)|run/predict)"
)
"""The routes that the page asks for; files are served from Gradio's own folder besides."""
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; object-src 'none';"
    " frame-ancestors 'none'; form-action 'none'; base-uri 'self'"
)
"""The browser itself then refuses whatever is not from this server, and to show the page in
another. Gradio's page needs inline scripts and styles."""
HEADERS = {
    **{"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"},
    "Referrer-Policy": "same-origin",
}
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]+)?")


class Guard:
    """ASGI application: answers what may be asked by another, with the policy above.

    Args:
        app: the other.
        host: that it listens on.
        public: whether other machines may ask.
    """

    def __init__(self, app: ASGIApp, host: str, public: bool) -> None:
        self._app, self._public = app, public
        self._names = {"localhost", "127.0.0.1", "::1", host.lower()}
        self._names |= {socket.gethostname().lower()} if public else set()
        self._files = f"/gradio_api/file={get_upload_folder()}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":  # the page opens none
            await WebSocketClose()(scope, receive, send)
        elif reason := self._refusal(scope):
            await PlainTextResponse(reason, 403)(scope, receive, send)
        else:
            await self._app(scope, receive, _with_policy(send))

    def _refusal(self, scope: Scope) -> str:
        hosts, origins = (Headers(scope=scope).getlist(name) for name in ("host", "origin"))
        host = hosts[0].lower() if len(hosts) == 1 else ""
        match = _HOST.fullmatch(host)
        # A web site can let its own name lead to this machine, but no address and no name of ours.
        if match is None or not self._is_ours(match[1].strip("[]")):
            return f"The viewer is not called {host!r}: start it with --host and this name."
        if any(one.lower() not in (f"http://{host}", f"https://{host}") for one in origins):
            return "The viewer answers no page but its own."
        path = scope["path"]
        return "" if OPEN.fullmatch(path) or path.startswith(self._files) else "This is closed."

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


@contextlib.asynccontextmanager
async def guarded(app: Any, host: str, public: bool) -> AsyncIterator[None]:
    """A lifespan that puts the guard before all else, Gradio's own CORS headers included.

    A middleware that Gradio is given comes after Gradio's own.
    """
    app.middleware_stack = Guard(app.middleware_stack, host, public)
    yield


def close_downloads() -> None:
    """Take away the client by which Gradio fetches addresses, also of files that events name."""

    async def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ValueError("the viewer fetches nothing")

    safehttpx.get = safehttpx.async_validate_url = refuse
