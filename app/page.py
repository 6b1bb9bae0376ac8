"""The page with the tabs, and its server.

Each part of a tab is a module with a class or a function `build` that builds its widgets inside the
``gr.Tab``. The layout is built once, when the viewer starts. A page scans the root when it is
loaded and then every few seconds. The event ``changed`` fills the lists of a tab; it occurs after
the page is loaded and whenever a scan finds a change.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from bilora_diffusion.core.files import counted

from . import compare, generate, grid, parts, results, training, validation
from .catalog import Catalog
from .guard import add_guards
from .parts import QUIET, html

FOLDER = Path(__file__).resolve().parent
TITLE = "Bi-LoRA viewer"
# Interval between two scans of the root
RESCAN_SECONDS = 5.0
# Maximum number of broken folders that the notice names; any others are only counted.
MAX_LISTED = 8
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")


def build(catalog: Catalog, device: str | None = None) -> gr.Blocks:
    """Build the page with all tabs.

    Args:
        catalog: folders of the viewer.
        device: device that samples images, such as "cuda:1"; None for a CUDA GPU if there is one.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        heading = html("frame-title")
        notice = html("frame-notice", visible=False)
        # Hidden texts with the hashes of the last scan; tabs listen to their `change` events.
        hashes: dict[str, gr.Textbox] = {}
        for kind in ("runs", "scores", "results"):
            hashes[kind] = gr.Textbox("", visible=False, elem_id=f"frame-{kind}")
        runs_changed = hashes["runs"].change
        scores_changed = hashes["scores"].change
        work = generate.Work(catalog, page, device)
        with gr.Tabs(elem_id="frame-tabs", overflow_behavior="wrap"):
            with gr.Tab("Compare", id="compare", elem_id="tab-compare"):
                validation.build(catalog, runs_changed)
                compare.Tab(catalog, scores_changed)
                grid.Grid(work, runs_changed)
            with gr.Tab("Generate", id="generate", elem_id="tab-generate"):
                generate.Tab(work, runs_changed)
            with gr.Tab("Training", id="training", elem_id="tab-training"):
                training.Tab(catalog, runs_changed)
            with gr.Tab("Results", id="results", elem_id="tab-results"):
                results.build(catalog, hashes["results"].change)

        def scan() -> list[Any]:
            catalog.refresh_if_stale()
            new_hashes = [catalog.content_hash(kind) for kind in hashes]
            return [heading_html(catalog), parts.notice(broken_html(catalog)), *new_hashes]

        events = [page.load, gr.Timer(RESCAN_SECONDS).tick]
        gr.on(events, scan, [], [heading, notice, *hashes.values()], **QUIET)
    return page


def heading_html(catalog: Catalog) -> str:
    """Return the heading with the root's name and the numbers of runs and results, as HTML."""
    scan = catalog.scan
    counts = f"{counted(len(scan.runs), 'run')}, {counted(len(scan.results), 'result')}"
    return f"<h1>{TITLE}</h1><p><b>{escape(catalog.name)}</b> · {counts}</p>"


def broken_html(catalog: Catalog) -> str:
    """Return the list of broken folders, as HTML; "" if there are none."""
    broken = catalog.scan.broken
    if not broken:
        return ""
    rows = ""
    for folder in broken[:MAX_LISTED]:
        rows += f"<li><code>{escape(folder.path)}</code> {escape(folder.reason)}</li>"
    if len(broken) > MAX_LISTED:
        rows += f"<li>and {len(broken) - MAX_LISTED} more</li>"
    subject = "1 folder is" if len(broken) == 1 else f"{len(broken)} folders are"
    title = f"{subject} not shown or incomplete"
    return f'<section class="broken"><b>{title}</b><ul>{rows}</ul></section>'


class Server(uvicorn.Server):
    """A server that prints no tracebacks for the streams of open pages when it stops."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections; those still in use are closed after a second."""
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def build_app(page: gr.Blocks) -> FastAPI:
    """Build the web application of a page.

    Gradio's `launch` is not used, because it requests the page from the new server and gives up if
    a proxy makes this request fail. Mounting Gradio's app in another app sends no request.
    """
    style = (FOLDER / "style.css").read_text("utf-8")
    script = (FOLDER / "page.js").read_text("utf-8")
    hues: dict[str, Any] = {"primary_hue": "teal", "secondary_hue": "teal", "neutral_hue": "slate"}
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page.queue(default_concurrency_limit=8, api_open=False),
        path="",
        footer_links=[],
        run_history=False,
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        max_file_size="1kb",
        theme=gr.themes.Default(**hues, font=FONT, font_mono=MONO),
        # In the argument `css`, Gradio would change the specificity of the rules.
        head=f"<style>{style}</style><script>{script}</script>",
    )
    # As in `launch`. Otherwise, Gradio would trust every path in an event, and copy any file that
    # this process can read into its cache.
    page.has_launched = True
    page.is_running = True
    return app


def build_server(
    catalog: Catalog,
    *,
    host: str,
    public: bool,
    device: str | None,
    allowed_hosts: Sequence[str] = (),
) -> Server:
    """Build the server of the page; call its method `run` to serve.

    Args:
        catalog: folders of the viewer.
        host: address that the server listens on.
        public: whether other machines may connect.
        device: device that samples images; None for a CUDA GPU if there is one.
        allowed_hosts: additional host names to accept, besides those of this machine.
    """
    page = build(catalog, device)
    app = build_app(page)
    events = []  # events that run on the server, not only in the browser
    for number, event in page.fns.items():
        if event.fn is not None:
            events.append(number)
    # The guard wraps the whole app, because Gradio's CORS middleware would wrap any middleware that
    # is added to the app.
    guarded_app = add_guards(app, events, host, public, allowed_hosts)
    # Without a timeout, the streams of an open page would keep the server running.
    return Server(uvicorn.Config(guarded_app, log_level="warning", timeout_graceful_shutdown=1))
