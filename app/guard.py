"""What of Gradio's server is closed here: outside addresses and uploads."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLOSED = ("/upload", "/proxy=", "/monitoring", "/file=http", "/deep_link")
"""Routes by which Gradio would fetch an outside address, take files, or count visitors."""
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; object-src 'none'"
)
"""The browser itself then refuses whatever is not from this server. Gradio's page needs inline
scripts and styles."""


class Guard:
    """ASGI middleware: closes routes that the viewer does not need and sends the policy above."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].lower().removeprefix("/gradio_api")
        if path.startswith(CLOSED):
            await PlainTextResponse("This route is closed.", 403)(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "same-origin"
            await send(message)

        await self.app(scope, receive, answer)
