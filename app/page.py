"""The page around the tabs, and its guarded server.

Each tab is a module that builds its widgets inside its ``gr.Tab``, by a class or by `build`. The
page's layout is made once, when the viewer starts. A page looks at the root when it is loaded and
every few seconds; a tab fills its lists at the event ``changed``: once after the load, and whenever
something is new.

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
from collections.abc import Collection, Sequence
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

from . import compare, generate, grid, parts, results, training, validation, vote
from .catalog import Catalog
from .parts import QUIET, html

FOLDER = Path(__file__).resolve().parent
TITLE = "Bi-LoRA viewer"
# From one look at the root to the next
RESCAN_SECONDS = 5.0
# Broken folders that the notice names; the others are counted.
MAX_LISTED = 8
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")
# The routes that the page asks for, besides files of Gradio's own folder.
OPEN_ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)"
    "|/(assets|static|svelte)/.*"
    r"|/gradio_api/(app_id|theme\.css|cancel|reset/?|heartbeat/[^/]*)"
    "|/gradio_api/(queue/(join|data)|run/predict)"
)
# A Host header: a name, or an IPv6 address in brackets, and perhaps a port.
HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^][:/@?#]+)(:\d+)?")
# Largest body of a request. The page sends choices and prompts only; uploads are closed.
MAX_BODY_BYTES = 1_000_000
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


def build(catalog: Catalog, device: str | None = None) -> gr.Blocks:
    """Build the page with all tabs.

    Args:
        catalog: folders of the viewer.
        device: device that samples images, such as "cuda:1"; None for the best one.
    """
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as page:
        heading = html("frame-title")
        notice = html("frame-notice", visible=False)
        # Hidden texts with the signs of the last scan: the change of one is the event of its tabs.
        signs: dict[str, gr.Textbox] = {}
        for kind in ("runs", "scores", "results"):
            signs[kind] = gr.Textbox("", visible=False, elem_id=f"frame-{kind}")
        runs_changed = signs["runs"].change
        scores_changed = signs["scores"].change
        work = generate.Work(catalog, page, device)
        with gr.Tabs(elem_id="frame-tabs", overflow_behavior="wrap"):
            with gr.Tab("Compare", id="compare", elem_id="tab-compare"):
                validation.build(catalog, runs_changed)
                compare.Tab(catalog, scores_changed)
                grid.Grid(work, runs_changed)
            with gr.Tab("Generate", id="generate", elem_id="tab-generate"):
                generate.Tab(work, runs_changed)
            with gr.Tab("Vote", id="vote", elem_id="tab-vote"):
                vote.Tab(catalog, scores_changed)
            with gr.Tab("Training", id="training", elem_id="tab-training"):
                training.Tab(catalog, runs_changed)
            with gr.Tab("Results", id="results", elem_id="tab-results"):
                results.build(catalog, signs["results"].change)

        def look() -> list[Any]:
            catalog.refresh_if_stale()
            new_signs = [catalog.fingerprint(kind) for kind in signs]
            return [title(catalog), parts.notice(notices(catalog)), *new_signs]

        events = [page.load, gr.Timer(RESCAN_SECONDS).tick]
        gr.on(events, look, [], [heading, notice, *signs.values()], **QUIET)
    return page


def title(catalog: Catalog) -> str:
    """The page's heading: name of the root, and the numbers of runs and results in it."""
    scan = catalog.scan
    counts = f"{counted(len(scan.runs), 'run')}, {counted(len(scan.results), 'result')}"
    return f"<h1>{TITLE}</h1><p><b>{escape(catalog.name)}</b> · {counts}</p>"


def notices(catalog: Catalog) -> str:
    """List of broken folders, as HTML; "" if there is none."""
    broken = catalog.scan.broken
    if not broken:
        return ""
    rows = ""
    for folder in broken[:MAX_LISTED]:
        rows += f"<li><code>{escape(folder.path)}</code> {escape(folder.reason)}</li>"
    if len(broken) > MAX_LISTED:
        rows += f"<li>and {len(broken) - MAX_LISTED} more</li>"
    subject = "1 folder is" if len(broken) == 1 else f"{len(broken)} folders are"
    return f'<section class="broken"><b>{subject} not shown</b><ul>{rows}</ul></section>'


class Server(uvicorn.Server):
    """A server whose end prints no traceback for each stream of an open page."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections, after a second by force."""
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
    """Build the server of the page; its method `run` serves.

    Gradio's own `launch` requests the page of the new server, and gives up after some seconds or
    when a proxy is set. Gradio's app as a part of another app does not.

    Args:
        catalog: folders of the viewer.
        host: address that the server listens on.
        public: True if other machines may look.
        device: device that samples images; None for the best one.
        allowed_hosts: names to answer to, besides those of this machine.
    """
    style = (FOLDER / "style.css").read_text("utf-8")
    script = (FOLDER / "page.js").read_text("utf-8")
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
    # Around the whole app: a middleware of it would come after Gradio's own CORS headers.
    guarded_app = guarded(app, host, public, allowed_hosts)
    # Without a timeout the streams of an open page would keep the server alive for ever.
    return Server(uvicorn.Config(guarded_app, log_level="warning", timeout_graceful_shutdown=1))


def guarded(app: ASGIApp, host: str, public: bool, allowed_hosts: Collection[str] = ()) -> ASGIApp:
    """Put an application behind all guards.

    Args:
        app: the application.
        host: address that it listens on.
        public: True if other machines may look.
        allowed_hosts: further names of this server, such as a proxy's.
    """
    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    names |= {name.lower() for name in allowed_hosts}
    if public:
        names.add(socket.gethostname().lower())
    guard = PageGuard(app, names, answers_addresses=public)
    return RequestBodyLimitMiddleware(guard, MAX_BODY_BYTES)


class PageGuard:
    """ASGI middleware that refuses foreign names, foreign pages and closed routes.

    A request must be addressed to one of this server's names, come from its own page, and ask for a
    route that this page needs. Each answer has the policy for the browser.

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
        self._files = f"/gradio_api/file={get_upload_folder()}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        page_origins = (f"http://{host}", f"https://{host}")
        path = scope["path"]
        if not self._is_own_name(host):
            refusal = f"The viewer is not called {host!r}: start it with --allow_host NAME."
        elif any(origin.lower() not in page_origins for origin in headers.getlist("origin")):
            refusal = "The viewer answers no page but its own."
        elif not OPEN_ROUTES.fullmatch(path) and not path.startswith(self._files):
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
