"""The tab Results: figures and reports of all results."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

import gradio as gr

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import regular_file
from eval.results.table import REPORT

from . import parts
from .catalog import Catalog, ResultItem
from .parts import QUIET, Update

# Commands that the notice of an empty tab may show
COMMANDS = ("landscape", "generalization", "text_scores", "dynamics")
# Maximum number of characters of a report that are shown
REPORT_BYTES = 1_000_000
# Markup that Gradio's page would render as HTML, requests or diagrams -> entities, which it renders
# as text. A report may come from somebody else.
ENTITIES = {"<": "&lt;", "![": "&#33;[", "```": "&#96;&#96;&#96;", "~~~": "&#126;&#126;&#126;"}
# Maximum levels of quotes and lists in a line; a few thousand would exhaust the browser's stack.
MAX_NESTING = 50
_MARK = r"[ \t]*(?:>|(?:[-+*]|\d{1,9}[.)])(?=\s))"
NESTED = re.compile(rf"^((?:{_MARK}){{{MAX_NESTING}}})(?:{_MARK})+", re.MULTILINE)
# Pattern of a picture in Markdown. No brackets are allowed inside, so that matching takes linear
# time even in a megabyte of "![".
PICTURE = re.compile(r"!\[[^\[\]]*\]\([^()]*\)")


def build(catalog: Catalog, changed: Any) -> None:
    """Build the tab inside the current `gr.Tab`.

    Args:
        catalog: folders of the viewer.
        changed: event after which the list of results is filled.
    """
    notice = parts.html("results-notice", visible=False)
    with gr.Column(visible=False) as body:
        choice = gr.Dropdown([], label="Result", elem_id="results-result")
        figures = parts.html("results-figures")
        report = gr.Markdown(elem_id="results-report", latex_delimiters=[])

    def fill(path: str | None) -> Update:
        results = sorted(catalog.scan.results, key=lambda item: (item.kind, item.path))
        if not results:
            names = [name for name in COMMANDS if parts.example_runs(catalog, name)]
            text = parts.empty_notice(catalog, "No results yet", *(names or COMMANDS[:2]))
            return {notice: parts.notice(text), body: gr.update(visible=False)}
        choices = []
        for item in results:
            kind = item.kind.replace("_", " ").capitalize().replace("Clip", "CLIP")
            choices.append((f"{kind}: {item.name}", item.path))
        paths = [item.path for item in results]
        if path not in paths:
            path = paths[0]
        return {
            notice: parts.notice(""),
            body: gr.update(visible=True),
            choice: gr.update(choices=choices, value=path),
            **show(path),
        }

    def show(path: str | None) -> Update:
        for item in catalog.scan.results:
            if item.path == path:
                return {
                    figures: figures_html(catalog, item),
                    report: read_report(catalog, item),
                }
        return {figures: gr.skip()}

    changed(fill, [choice], [notice, body, choice, figures, report], **QUIET)
    choice.input(show, [choice], [figures, report], **QUIET)


def figures_html(catalog: Catalog, item: ResultItem) -> str:
    """Return the figures of a result as HTML; a sentence replaces each unreadable figure."""
    figures = ""
    for path in item.figures:
        name = PurePosixPath(path).stem
        uri = parts.file_uri_below_root(catalog, path, parts.MAX_FIGURE_SIDE)
        label = name.replace("_", " ").replace("-", " ")
        missing = f"The figure {name}.png can't be read: run the result's command again."
        figures += parts.image_html(uri, label, missing)
    return figures


def read_report(catalog: Catalog, item: ResultItem) -> str:
    """Read a result's report without its figures, as safe Markdown; a sentence if it can't be."""
    try:
        path = regular_file(catalog.resolve(f"{item.path}/{REPORT}"))
        # `regular_file` refuses a pipe, which would block the reader.
        with path.open(encoding="utf-8", errors="replace") as file:
            report = file.read(REPORT_BYTES)
    except (UserError, OSError):
        return f"The report {REPORT} can't be read: run the result's command again."
    return escape_markdown(PICTURE.sub("", report))


def escape_markdown(markdown: str) -> str:
    """Escape Markdown, so that Gradio's page renders no HTML, requests or diagrams from it.

    Quotes and lists nested deeper than `MAX_NESTING` are flattened.
    """
    markdown = NESTED.sub(r"\1", markdown)
    for mark, entities in ENTITIES.items():
        markdown = markdown.replace(mark, entities)
    return markdown
