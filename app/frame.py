"""The page around the tabs: title, what was found, notices, and how it is served.

A tab is a module with ``build(catalog)``, called inside its ``gr.Tab``. The page's layout is made
once, when the viewer starts, so a tab fills its lists when a page is loaded, by
``gr.on(None, fill, inputs=[], outputs=[...])``. "Refresh" looks at the root again and loads the
page anew.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from . import compare, flatness, generate, training, vote
from .catalog import Catalog
from .guard import Guard

HERE = Path(__file__).resolve().parent
TITLE = "Bi-LoRA viewer"
LISTED = 8
"""Broken folders that are named in the notice; the others are counted."""
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONO = ("ui-monospace", "Consolas", "monospace")
EMPTY = """
<section class="empty">
  <h2>Nothing to show yet</h2>
  <p>The folder <b>{name}</b> holds no runs and no results. Make some, then press Refresh:</p>
  <ol>
    <li><code>make demo</code> trains LoRA and Bi-LoRA on the miniature</li>
    <li><code>python -m eval.clip_scores</code> draws and scores images of both</li>
    <li><code>python -m app.viewer</code> from the same folder shows them here</li>
  </ol>
  <p>Runs elsewhere? Give their folder: <code>python -m app.viewer FOLDER</code></p>
</section>
"""


def build(catalog: Catalog, device: str | None = None) -> gr.Blocks:
    """The whole page.

    Args:
        catalog: what there is to show.
        device: of the Generate tab; None for the best.
    """
    tabs: dict[str, Callable[[], None]] = {
        "Compare": lambda: compare.build(catalog),
        "Generate": lambda: generate.build(catalog, device),
        "Vote": lambda: vote.build(catalog),
        "Training": lambda: training.build(catalog),
        "Flatness": lambda: flatness.build(catalog),
    }
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as page:
        with gr.Row(elem_id="frame-head"):
            heading = gr.HTML(elem_id="frame-title", apply_default_css=False, scale=1)
            refresh = gr.Button("Refresh", elem_id="frame-refresh", size="sm", scale=0)
        notice = gr.HTML(elem_id="frame-notice", apply_default_css=False, visible=False)
        with gr.Tabs(elem_id="frame-tabs", overflow_behavior="wrap"):
            for name, fill in tabs.items():
                with gr.Tab(name, id=name.lower(), elem_id=f"tab-{name.lower()}"):
                    fill()
        gr.on(
            None,
            lambda: (title(catalog), _notice(catalog)),
            inputs=[],
            outputs=[heading, notice],
            show_progress="hidden",
            api_visibility="private",
        )
        refresh.click(
            catalog.refresh, [], [], show_progress="hidden", api_visibility="private"
        ).then(None, js="() => window.location.reload()")
    return page


def title(catalog: Catalog) -> str:
    """The page's heading: the root's name and how much was found there."""
    counts = (
        (len(catalog.runs()), "run", "runs"),
        (len(catalog.scores()), "score folder", "score folders"),
        (len(catalog.figures()), "figure result", "figure results"),
    )
    found = ", ".join(f"{count} {one if count == 1 else many}" for count, one, many in counts)
    return f"<h1>{TITLE}</h1><p><b>{html.escape(catalog.name)}</b> · {found}</p>"


def notices(catalog: Catalog) -> str:
    """What to run in an empty root, and which folders are broken."""
    broken = catalog.broken()
    text = ""
    if not (catalog.runs() or catalog.scores() or catalog.figures()):
        text += EMPTY.format(name=html.escape(catalog.name))
    if broken:
        rows = "".join(
            f"<li><code>{html.escape(row.path)}</code> {html.escape(row.reason)}</li>"
            for row in broken[:LISTED]
        )
        more = len(broken) - LISTED
        rows += f"<li>and {more} more</li>" if more > 0 else ""
        what = "1 folder is" if len(broken) == 1 else f"{len(broken)} folders are"
        text += f'<section class="broken"><b>{what} not shown</b><ul>{rows}</ul></section>'
    return text


def _notice(catalog: Catalog) -> Any:
    text = notices(catalog)
    return gr.update(value=text, visible=bool(text))


def _head() -> str:
    """Style and script as they are: in `css` Gradio would change the weight of the rules."""
    style, script = ((HERE / name).read_text("utf-8") for name in ("style.css", "keyboard.js"))
    return f"<style>{style}</style><script>{script}</script>"


def launch(catalog: Catalog, *, host: str, port: int, device: str | None) -> None:
    """Serve until interrupted.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    page = build(catalog, device).queue(default_concurrency_limit=8, api_open=False)
    theme = gr.themes.Default(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=FONT, font_mono=MONO
    )
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
        theme=theme,
        head=_head(),
    )
    where = f"[{host}]" if ":" in host else host
    print(f"{TITLE}: http://{where}:{port} shows {catalog.name}; Ctrl-C ends it.", flush=True)
    page.block_thread()
