"""The page around the tabs: title, what was found, notices, how it is served, and what of Gradio's
server is closed: outside addresses and uploads.

A tab is a module with ``Tab(catalog, signs)``, made inside its ``gr.Tab``. The page's layout is
made once, when the viewer starts, so a tab fills its lists when a page is loaded, and again when
there is something new under the root, at which is looked at every load and every few seconds: at
the events ``signs``.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import compare, generate, results, training, validation, vote
from .catalog import Catalog
from .parts import QUIET, html, shown

HERE = Path(__file__).resolve().parent
TITLE = "Bi-LoRA viewer"
RESCAN_SECONDS = 5.0
LISTED = 8
"""Broken folders that are named in the notice; the others are counted."""
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")
CLOSED = ("/upload", "/proxy=", "/monitoring", "/file=http", "/deep_link")
"""Routes by which Gradio would fetch an outside address, take files, or count visitors."""
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; object-src 'none'"
)
"""The browser itself then refuses whatever is not from this server. Gradio's page needs inline
scripts and styles."""


def build(catalog: Catalog, device: str | None = None) -> gr.Blocks:
    """The whole page.

    Args:
        catalog: what there is to show.
        device: of the Generate tab; None for the best.
    """
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as page:
        heading = html("frame-title")
        notice = html("frame-notice", visible=False)
        kinds = ("runs", "scores", "figures")
        seen = {kind: gr.Textbox(catalog.sign(kind), visible=False) for kind in kinds}
        runs, scores, figures = ([page.load, seen[kind].change] for kind in kinds)
        tabs: dict[str, Callable[[], object]] = {
            "Compare": lambda: (
                validation.build(catalog, runs),
                compare.Tab(catalog, page, scores[1:]),
            ),
            "Generate": lambda: generate.Tab(catalog, runs, device),
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
            return [title(catalog), shown(notices(catalog)), *(catalog.sign(kind) for kind in seen)]

        gr.on(
            [page.load, gr.Timer(RESCAN_SECONDS).tick],
            look,
            inputs=[],
            outputs=[heading, notice, *seen.values()],
            **QUIET,
        )
    return page


def title(catalog: Catalog) -> str:
    """The page's heading: the root's name and how much was found there."""
    items = {
        "run": catalog.now.runs,
        "score folder": catalog.now.scores,
        "result": catalog.now.figures,
    }
    counts = [f"{len(some)} {what}{'s' * (len(some) != 1)}" for what, some in items.items()]
    return f"<h1>{TITLE}</h1><p><b>{escape(catalog.name)}</b> · {', '.join(counts)}</p>"


def notices(catalog: Catalog) -> str:
    """Which folders are broken; "" without one."""
    broken = catalog.now.broken
    if not broken:
        return ""
    rows = "".join(
        f"<li><code>{escape(row.path)}</code> {escape(row.reason)}</li>" for row in broken[:LISTED]
    )
    more = len(broken) - LISTED
    rows += f"<li>and {more} more</li>" if more > 0 else ""
    what = "1 folder is" if len(broken) == 1 else f"{len(broken)} folders are"
    return f'<section class="broken"><b>{what} not shown</b><ul>{rows}</ul></section>'


def _theme() -> gr.themes.Base:
    """Gradio's own, with text and buttons of a contrast of at least 4.5 in light and dark."""
    strong, stronger = "#0f766e", "#115e59"
    theme = gr.themes.Default(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=FONT, font_mono=MONO
    )
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        block_info_text_color="*neutral_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_300",
        button_primary_background_fill=strong,
        button_primary_background_fill_dark=strong,
        button_primary_background_fill_hover=stronger,
        button_primary_background_fill_hover_dark=stronger,
        color_accent=strong,
        link_text_color=strong,
        link_text_color_dark="#2dd4bf",
    )


def _head() -> str:
    """Style and script as they are: in `css` Gradio would change the weight of the rules."""
    style, script = ((HERE / name).read_text("utf-8") for name in ("style.css", "page.js"))
    return f"<style>{style}</style><script>{script}</script>"


def launch(catalog: Catalog, *, host: str, port: int, device: str | None) -> None:
    """Serve until interrupted.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    page = build(catalog, device).queue(default_concurrency_limit=8, api_open=False)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        allowed_paths=[],
        max_file_size="1kb",
        app_kwargs={"middleware": [Middleware(Guard)], "docs_url": None, "redoc_url": None},
        theme=_theme(),
        head=_head(),
    )
    where = f"[{host}]" if ":" in host else host
    print(f"{TITLE}: http://{where}:{port} shows {catalog.name}; Ctrl-C ends it.", flush=True)
    page.block_thread()


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
