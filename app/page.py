"""The page around the tabs, and its guarded server.

A tab is a module with ``Tab(catalog, changed)``, made inside its ``gr.Tab``. The page's layout is
made once, when the viewer starts. A page looks at the root when it is loaded and every few seconds;
a tab fills its lists at the event ``changed``: once after the load, and whenever something is new.

The server answers to its own names and its own page, on the page's routes. Gradio's server also
takes files, fetches the addresses that it is sent, and on any host but "localhost" lets every web
site read its answers.
"""

from __future__ import annotations

import io
import ipaddress
import logging
import re
import socket
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, TextIO

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bilora_diffusion.core.errors import print_trace_if_asked, reason, strip_controls
from bilora_diffusion.core.files import counted

from . import compare, generate, parts, results, training, validation, vote
from .catalog import Catalog
from .parts import QUIET, html
from .sampling import Work

FOLDER = Path(__file__).resolve().parent
TITLE = "Bi-LoRA viewer"
RESCAN_SECONDS = 5.0
LISTED = 8
"""Broken folders that are named in the notice; the others are counted."""
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")
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


def build(catalog: Catalog, device: str | None = None) -> gr.Blocks:
    """The whole page; ``device`` draws images, None is the best."""
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as page:
        heading = html("frame-title")
        notice = html("frame-notice", visible=False)
        kinds = ("runs", "scores", "figures")
        last_signs = {
            kind: gr.Textbox("", visible=False, elem_id=f"frame-{kind}") for kind in kinds
        }
        runs, scores, figures = (last_signs[kind].change for kind in kinds)
        drawing = Work(catalog, page, device)
        tabs: dict[str, Callable[[], object]] = {
            "Compare": lambda: (
                validation.build(catalog, runs),
                compare.Tab(catalog, scores),
                generate.Grid(drawing, runs),
            ),
            "Generate": lambda: generate.Tab(drawing, runs),
            "Vote": lambda: vote.Tab(catalog, scores),
            "Training": lambda: training.Tab(catalog, runs),
            "Results": lambda: results.build(catalog, figures),
        }
        with gr.Tabs(elem_id="frame-tabs", overflow_behavior="wrap"):
            for name, fill in tabs.items():
                with gr.Tab(name, id=name.lower(), elem_id=f"tab-{name.lower()}"):
                    fill()

        def look() -> list[Any]:
            catalog.look()
            signs = (catalog.sign(kind) for kind in last_signs)
            return [title(catalog), parts.notice(notices(catalog)), *signs]

        looks = [page.load, gr.Timer(RESCAN_SECONDS).tick]
        gr.on(looks, look, [], [heading, notice, *last_signs.values()], **QUIET)
    return page


def title(catalog: Catalog) -> str:
    """The page's heading: the root's name and the numbers of folders there."""
    scan = catalog.scan
    items = {"run": scan.runs, "score folder": scan.scores, "result": scan.figures}
    counts = [counted(len(folders), kind) for kind, folders in items.items()]
    return f"<h1>{TITLE}</h1><p><b>{escape(catalog.name)}</b> · {', '.join(counts)}</p>"


def notices(catalog: Catalog) -> str:
    """The list of broken folders; "" without one."""
    broken = catalog.scan.broken
    if not broken:
        return ""
    rows = "".join(
        f"<li><code>{escape(row.path)}</code> {escape(row.reason)}</li>" for row in broken[:LISTED]
    )
    num_more = len(broken) - LISTED
    rows += f"<li>and {num_more} more</li>" if num_more > 0 else ""
    subject = "1 folder is" if len(broken) == 1 else f"{len(broken)} folders are"
    return f'<section class="broken"><b>{subject} not shown</b><ul>{rows}</ul></section>'


class Server(uvicorn.Server):
    """A server that prints no traceback for each stream of an open page when it ends."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections, those that stay open after a second by force."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def server(
    catalog: Catalog,
    *,
    host: str,
    public: bool,
    device: str | None,
    allowed_hosts: Sequence[str] = (),
) -> Server:
    """Return the server of the page, which serves when it is run.

    Gradio's own ``launch`` asks the new server for its page and gives up after some seconds, or
    when a proxy is set. Its app as a part of another does not.

    Args:
        public: whether other machines may look.
        allowed_hosts: names to answer to, besides those of this machine.
    """
    style, script = ((FOLDER / name).read_text("utf-8") for name in ("style.css", "page.js"))
    hues: dict[str, Any] = {"primary_hue": "teal", "secondary_hue": "teal", "neutral_hue": "slate"}
    app = gr.mount_gradio_app(
        FastAPI(),
        build(catalog, device).queue(default_concurrency_limit=8, api_open=False),
        path="",
        footer_links=[],
        run_history=False,
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        max_file_size="1kb",
        theme=gr.themes.Default(**hues, font=FONT, font_mono=MONO),
        # In `css` Gradio would change the weight of the rules.
        head=f"<style>{style}</style><script>{script}</script>",
    )
    # Before all else, Gradio's own CORS headers included: its middleware would come after them.
    guarded_app = guarded(app, host, public, allowed_hosts)
    # A page that stays open would keep its streams, and so the server, forever.
    return Server(uvicorn.Config(guarded_app, log_level="warning", timeout_graceful_shutdown=1))


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
