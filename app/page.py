"""The page around the tabs, and its server.

Each tab is a module that builds its widgets inside its ``gr.Tab``, by a class or by `build`. The
page's layout is made once, when the viewer starts. A page looks at the root when it is loaded and
every few seconds; a tab fills its lists at the event ``changed``: once after the load, and whenever
something is new.
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
from .guard import guarded
from .parts import QUIET, html

FOLDER = Path(__file__).resolve().parent
TITLE = "Bi-LoRA viewer"
# From one look at the root to the next
RESCAN_SECONDS = 5.0
# Broken folders that the notice names; the others are counted.
MAX_LISTED = 8
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")


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


def application(page: gr.Blocks) -> FastAPI:
    """The web application of a page.

    Gradio's own `launch` requests the page of the new server, and gives up after some seconds or
    when a proxy is set. Gradio's app as a part of another app does not.
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
        # In `css` Gradio would change the weight of the rules.
        head=f"<style>{style}</style><script>{script}</script>",
    )
    # As `launch` does. Without it Gradio trusts every path in an event: it copies any file that
    # this process can read into its cache, and serves it from there.
    page.has_launched = True
    page.is_running = True
    return app


def server(
    catalog: Catalog,
    *,
    host: str,
    public: bool,
    device: str | None,
    allowed_hosts: Sequence[str] = (),
) -> Server:
    """Build the server of the page; its method `run` serves.

    Args:
        catalog: folders of the viewer.
        host: address that the server listens on.
        public: True if other machines may look.
        device: device that samples images; None for the best one.
        allowed_hosts: names to answer to, besides those of this machine.
    """
    page = build(catalog, device)
    app = application(page)
    events = []  # without those that are a script of the page
    for number, event in page.fns.items():
        if event.fn is not None:
            events.append(number)
    # Around the whole app: a middleware of it would come after Gradio's own CORS headers.
    guarded_app = guarded(app, events, host, public, allowed_hosts)
    # Without a timeout the streams of an open page would keep the server alive for ever.
    return Server(uvicorn.Config(guarded_app, log_level="warning", timeout_graceful_shutdown=1))
