"""The tab "Flatness": figures and reports of loss landscapes, dynamics and generalization."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

import gradio as gr
from PIL import Image

from bilora_diffusion.errors import UserError

from .catalog import Catalog, FigureItem

TITLES = {
    "landscape": "Loss landscape",
    "dynamics": "Training dynamics",
    "generalization": "Generalization",
    "sweep": "Sweep",
}
"""Kinds of results in the order in which the list has them."""
REPORT_BYTES = 1_000_000
EMPTY = """
<section class="empty">
  <h2>No figures yet</h2>
  <p>Measure how flat the minima of your runs are, then press Refresh:</p>
  <ol>
    <li><code>python -m eval.landscape RUN RUN --output_dir landscape</code>: loss around the
      weights, sharpness and top eigenvalue</li>
    <li><code>python -m eval.dynamics RUN RUN --output_dir dynamics</code>: what the adapters did,
      of runs trained with <code>--log_dynamics</code></li>
    <li><code>python -m eval.generalization RUN RUN --output_dir generalization</code>: training and
      held-out loss over time</li>
  </ol>
</section>
"""
_PICTURE = re.compile(r"!\[[^\]]*\]\([^)]*\)|<img[^>]*>", re.IGNORECASE)
Update = dict[Any, Any]


def build(catalog: Catalog) -> None:
    """Build the tab inside the current ``gr.Tab``."""
    notice = gr.HTML(visible=False, elem_id="flatness-notice")
    with gr.Column(visible=False) as body:
        chosen = gr.Dropdown([], label="Result", elem_id="flatness-result")

    def load() -> Update:
        results = listed(catalog)
        if not results:
            return {notice: gr.update(value=EMPTY, visible=True)}
        choices = [
            (f"{TITLES.get(item.kind, item.kind)}: {item.name}", _key(item)) for item in results
        ]
        return {
            body: gr.update(visible=True),
            chosen: gr.update(choices=choices, value=_key(results[0])),
        }

    gr.on(None, load, [], [notice, body, chosen], show_progress="hidden", api_visibility="private")

    @gr.render(inputs=[chosen], show_progress="hidden")
    def show(key: str | None) -> None:
        item = next((item for item in catalog.figures() if _key(item) == key), None)
        if item is not None:
            _show(catalog, item)


def _show(catalog: Catalog, item: FigureItem) -> None:
    images, lost = pictures(catalog, item)
    with gr.Row(elem_id="flatness-figures"):
        for image, name in images:
            gr.Image(
                image,
                show_label=False,  # it would lie over the figure
                alt_text=name,
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                min_width=320,
            )
    gr.Markdown("\n\n".join([*lost, text(catalog, item)]), elem_id="flatness-report")


def listed(catalog: Catalog) -> list[FigureItem]:
    """The results, by kind and path."""
    order = {kind: place for place, kind in enumerate(TITLES)}
    return sorted(catalog.figures(), key=lambda item: (order.get(item.kind, len(order)), item.path))


def pictures(catalog: Catalog, item: FigureItem) -> tuple[list[tuple[Image.Image, str]], list[str]]:
    """The figures of a result with their captions, and a sentence for each that can't be read."""
    found, lost = [], []
    for path in item.figures:
        name = PurePosixPath(path).stem
        try:
            with Image.open(catalog.resolve(path)) as opened:
                found.append((opened.convert("RGBA"), name.replace("_", " ").replace("-", " ")))
        except (UserError, OSError):
            lost.append(f"The figure {name}.png can't be read: make the result again.")
    return found, lost


def text(catalog: Catalog, item: FigureItem) -> str:
    """The report of a result, its pictures left out, since they stand above it."""
    path = str(PurePosixPath(item.path) / f"{item.kind}.md")
    try:
        with catalog.resolve(path).open(encoding="utf-8", errors="replace") as file:
            report = file.read(REPORT_BYTES)
    except (UserError, OSError):
        return f"The report {item.kind}.md can't be read: run `python -m eval.{item.kind}` again."
    return _PICTURE.sub("", report)


def _key(item: FigureItem) -> str:
    return f"{item.kind} {item.path}"
