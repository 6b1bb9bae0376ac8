"""The page around the tabs, and its server: title, counts and notices.

A tab is a module with ``Tab(catalog, changed)``, made inside its ``gr.Tab``. The page's layout is
made once, when the viewer starts. A page looks at the root when it is loaded and every few seconds;
a tab fills its lists at the event ``changed``: once after the load, and whenever something is new.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from socket import socket
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from bilora_diffusion.core.files import counted

from . import compare, generate, grid, guard, parts, results, training, validation, vote
from .catalog import Catalog
from .parts import QUIET, html

FOLDER = Path(__file__).resolve().parent
TITLE = "Bi-LoRA viewer"
RESCAN_SECONDS = 5.0
LISTED = 8
"""Broken folders that are named in the notice; the others are counted."""
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")


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
        drawing = generate.Work(catalog, page, device)
        tabs: dict[str, Callable[[], object]] = {
            "Compare": lambda: (
                validation.build(catalog, runs),
                compare.Tab(catalog, scores),
                grid.Grid(drawing, runs),
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

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
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
    guarded = guard.guarded(app, host, public, allowed_hosts)
    # A page that stays open would keep its streams, and so the server, forever.
    return Server(uvicorn.Config(guarded, log_level="warning", timeout_graceful_shutdown=1))
