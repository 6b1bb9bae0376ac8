"""The tab "Results": figures and reports of all results."""

from __future__ import annotations

import contextlib
import re
from pathlib import PurePosixPath
from typing import Any

import gradio as gr
from PIL import Image

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import finite
from eval.table import REPORT

from . import parts
from .catalog import Catalog, ResultItem
from .parts import QUIET, Update

RESULTS = ("landscape", "generalization", "text_scores", "dynamics")
REPORT_BYTES = 1_000_000
_INERT = {"<": "&lt;", "![": "&#33;[", "```": "&#96;&#96;&#96;", "~~~": "&#126;&#126;&#126;"}
"""What Gradio's page makes HTML, requests and diagrams of, as entities, which it shows as text."""
_PICTURE = re.compile(r"!\[[^\[\]]*\]\([^()]*\)")  # linear also in a megabyte of "!["


def build(catalog: Catalog, changed: Any) -> None:
    """Build the tab."""
    notice = parts.html("results-notice", visible=False)
    with gr.Column(visible=False) as body:
        chosen = gr.Dropdown([], label="Result", elem_id="results-result")

    def load(selected: str | None) -> Update:
        results = sorted(catalog.scan.figures, key=lambda item: (item.kind, item.path))
        if not results:
            names = [name for name in RESULTS if parts.measurable(catalog, name)] or RESULTS[:2]
            return {notice: parts.notice(parts.empty(catalog, "No results yet", *names))}
        choices = [
            (f"{item.kind.replace('_', ' ').capitalize()}: {item.name}", item.path)
            for item in results
        ]
        keys = [item.path for item in results]
        return {
            notice: parts.notice(""),
            body: gr.update(visible=True),
            chosen: gr.update(choices=choices, value=selected if selected in keys else keys[0]),
        }

    changed(load, [chosen], [notice, body, chosen], **QUIET)

    @gr.render([chosen], triggers=[chosen.change, changed], show_progress="hidden")
    def show(key: str | None) -> None:
        item = next((item for item in catalog.scan.figures if item.path == key), None)
        if item is not None:
            _show(catalog, item)


def _show(catalog: Catalog, item: ResultItem) -> None:
    images, unread = pictures(catalog, item)
    with gr.Row(elem_id="results-figures"):
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
    report = "\n\n".join([*unread, text(catalog, item)])
    gr.Markdown(report, elem_id="results-report", latex_delimiters=[])


def pictures(catalog: Catalog, item: ResultItem) -> tuple[list[tuple[Image.Image, str]], list[str]]:
    """The figures of a result with their captions, and a sentence for each that can't be read."""
    figures, unread = [], []
    for path in item.figures:
        name, picture = PurePosixPath(path).stem, None
        with contextlib.suppress(UserError):  # a link out of the root
            picture = parts.read(catalog.resolve(path), "RGBA")
        if picture is None:
            unread.append(inert(f"The figure {name}.png can't be read: make the result again."))
        else:
            figures.append((picture, name.replace("_", " ").replace("-", " ")))
    return figures, unread


def text(catalog: Catalog, item: ResultItem) -> str:
    """The report of a result, inert, without its pictures, since they stand above it."""
    try:
        path = finite(catalog.resolve(f"{item.path}/{REPORT}"))
        with path.open(encoding="utf-8", errors="replace") as file:
            report = file.read(REPORT_BYTES)
    except (UserError, OSError):
        return f"The report {REPORT} can't be read: run `python -m eval.{item.kind}` again."
    return inert(_PICTURE.sub("", report))


def inert(markdown: str) -> str:
    """Markdown of which Gradio's page makes no HTML of its own, no request and no diagram."""
    for beginning, entities in _INERT.items():
        markdown = markdown.replace(beginning, entities)
    return markdown
