"""The tab "Results": figures and reports of all results."""

from __future__ import annotations

import contextlib
import re
from pathlib import PurePosixPath
from typing import Any

import gradio as gr
from PIL import Image

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import regular_file
from eval.results.table import REPORT

from . import parts
from .catalog import Catalog, ResultItem
from .parts import QUIET, Update

# Commands that the notice of an empty tab shows.
RESULTS = ("landscape", "generalization", "text_scores", "dynamics")
# Part of a report that is shown
REPORT_BYTES = 1_000_000
# Marks of which Gradio's page would make HTML, requests or diagrams, and entities for them, which
# it shows as text.
ENTITIES = {"<": "&lt;", "![": "&#33;[", "```": "&#96;&#96;&#96;", "~~~": "&#126;&#126;&#126;"}
# Levels of quotes and lists in a line; some thousand would fill the browser's stack.
MAX_NESTING = 50
_MARK = r"[ \t]*(?:>|(?:[-+*]|\d{1,9}[.)])(?=\s))"
NESTED = re.compile(rf"^((?:{_MARK}){{{MAX_NESTING}}})(?:{_MARK})+", re.MULTILINE)
# A picture in Markdown; no bracket within, so that a megabyte of "![" takes linear time.
PICTURE = re.compile(r"!\[[^\[\]]*\]\([^()]*\)")


def build(catalog: Catalog, changed: Any) -> None:
    """Build the tab inside the current `gr.Tab`.

    Args:
        catalog: folders of the viewer.
        changed: event after which the list of results is filled.
    """
    notice = parts.html("results-notice", visible=False)
    with gr.Column(visible=False) as body:
        chosen = gr.Dropdown([], label="Result", elem_id="results-result")

    def load(selected: str | None) -> Update:
        results = sorted(catalog.scan.results, key=lambda item: (item.kind, item.path))
        if not results:
            names = [name for name in RESULTS if parts.measurable(catalog, name)]
            text = parts.empty(catalog, "No results yet", *(names or RESULTS[:2]))
            return {notice: parts.notice(text)}
        choices = []
        for item in results:
            kind = item.kind.replace("_", " ").capitalize().replace("Clip", "CLIP")
            choices.append((f"{kind}: {item.name}", item.path))
        paths = [item.path for item in results]
        path = selected if selected in paths else paths[0]
        return {
            notice: parts.notice(""),
            body: gr.update(visible=True),
            chosen: gr.update(choices=choices, value=path),
        }

    changed(load, [chosen], [notice, body, chosen], **QUIET)

    @gr.render([chosen], triggers=[chosen.change, changed], show_progress="hidden")
    def show(path: str | None) -> None:
        for item in catalog.scan.results:
            if item.path == path:
                _show(catalog, item)


def _show(catalog: Catalog, item: ResultItem) -> None:
    """Build the figures and the report of a result."""
    images, faults = pictures(catalog, item)
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
    report = "\n\n".join([*faults, text(catalog, item)])
    gr.Markdown(report, elem_id="results-report", latex_delimiters=[])


def pictures(catalog: Catalog, item: ResultItem) -> tuple[list[tuple[Image.Image, str]], list[str]]:
    """The figures of a result with their captions, and a sentence for each that can't be read."""
    figures = []
    faults = []
    for path in item.figures:
        name = PurePosixPath(path).stem
        picture = None
        with contextlib.suppress(UserError):  # a link out of the root
            picture = parts.read(catalog.resolve(path), "RGBA")
        if picture is None:
            faults.append(inert(f"The figure {name}.png can't be read: make the result again."))
        else:
            figures.append((picture, name.replace("_", " ").replace("-", " ")))
    return figures, faults


def text(catalog: Catalog, item: ResultItem) -> str:
    """The report of a result as inert Markdown, without its figures, which are above it."""
    try:
        path = regular_file(catalog.resolve(f"{item.path}/{REPORT}"))
        # `regular_file` refuses a pipe, which would keep its reader waiting.
        with path.open(encoding="utf-8", errors="replace") as file:
            report = file.read(REPORT_BYTES)
    except (UserError, OSError):
        return f"The report {REPORT} can't be read: make the result again."
    return inert(PICTURE.sub("", report))


def inert(markdown: str) -> str:
    """Make Markdown harmless: Gradio's page makes no HTML, request or diagram of it.

    Marks of nesting beyond `MAX_NESTING` are left out.
    """
    markdown = NESTED.sub(r"\1", markdown)
    for mark, entities in ENTITIES.items():
        markdown = markdown.replace(mark, entities)
    return markdown
