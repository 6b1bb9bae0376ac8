"""The Compare tab's upper part: validation images of runs side by side, over the steps.

It needs no scores: training leaves the images. The base model's column is a run's images of step 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from . import parts
from .catalog import Catalog
from .parts import QUIET, Update
from .runs import RunItem, ordered, pair

COLUMNS = 6
"""Runs that fit side by side."""
LISTED = 6
"""Runs without images that are named; the others are counted."""


def build(catalog: Catalog, changed: Any) -> None:
    """Build the part inside the current ``gr.Tab``."""
    empty = parts.html("validation-empty", visible=False)
    with gr.Accordion("Validation images", visible=False, elem_id="validation") as body:
        with gr.Row(equal_height=True):
            place: dict[str, Any] = {"elem_id": "validation-runs", "scale": 2, "min_width": 300}
            chosen = gr.Dropdown([], label="Runs", multiselect=True, max_choices=COLUMNS, **place)
            step = gr.Radio([], label="Images at step", elem_id="validation-step")
        without = parts.html("validation-without", visible=False)
        images = parts.html("validation-images")

    def fill(paths: list[str], at: int | None) -> Update:
        runs = ordered(with_images(catalog))
        if not runs:
            names = ["images"] if catalog.now.runs else ["demo", "train"]
            title = "No validation images yet" if catalog.now.runs else "No images yet"
            text = "" if catalog.now.scores else parts.empty(catalog, title, *names)
            return {empty: parts.notice(text), body: gr.update(visible=False)}
        there = {run.path for run in runs}
        paths = [path for path in paths if path in there] or [run.path for run in pair(runs)]
        return {
            empty: gr.update(visible=False),
            body: gr.update(visible=True),
            chosen: gr.update(choices=[(run.name, run.path) for run in runs], value=paths),
            without: parts.notice(without_images(catalog)),
            **show(paths, at),
        }

    def show(paths: list[str], at: int | None) -> Update:
        runs = {run.path: run for run in with_images(catalog)}
        there = [runs[path] for path in paths if path in runs]
        steps = common_steps(there)
        at = at if at in steps else (steps or [0])[-1]
        choice = gr.update(choices=steps, value=at, visible=len(steps) > 1)
        return {step: choice, images: table(catalog, there, at)}

    changed(fill, [chosen, step], [empty, body, chosen, without, step, images], **QUIET)
    gr.on([chosen.input, step.input], show, [chosen, step], [step, images], **QUIET)


def with_images(catalog: Catalog) -> list[RunItem]:
    """Runs that have validation images."""
    return [run for run in catalog.now.runs if run.steps]


def without_images(catalog: Catalog) -> str:
    """The runs that can't be shown here and the reason, as HTML; "" without one."""
    runs = [run for run in catalog.now.runs if not (run.steps or run.prompts or run.is_text)]
    names = [run.name for run in runs]
    if not names:
        return ""
    listed = ", ".join(map(escape, names[:LISTED]))
    if len(names) > LISTED:
        listed += f" and {len(names) - LISTED} more"
    return (
        f'<p class="quiet">Without validation images: {listed}.'
        " Train with <code>--validation_prompt</code> to see a run here.</p>"
    )


def common_steps(runs: Sequence[RunItem]) -> list[int]:
    """Steps after the start at which any of the runs has images; only the start where none has."""
    steps = sorted({step for run in runs for step in run.steps})
    return [step for step in steps if step] or steps


def table(catalog: Catalog, runs: Sequence[RunItem], at: int) -> str:
    """One block for each prompt, with the images of the base model and each run, as HTML."""
    columns = [("base model", run, 0) for run in runs if at and 0 in run.steps][:1]
    columns += [(run.name, run, at) for run in runs]
    blocks = ""
    for prompt, place in dict.fromkeys(key for run in runs for key in run.images):
        cells = ""
        for name, run, step in columns:
            number = run.images.get((prompt, place))
            address = None if number is None else parts.below(catalog, run.image(step, number))
            missing = "not a prompt of this run" if number is None else f"no image at step {step}"
            picture = parts.image(address, f"{name}: {prompt}", missing)
            cells += f"<figure>{picture}<figcaption>{escape(name)}</figcaption></figure>"
        which = f" ({place + 1})" if place else ""
        blocks += (
            f'<section class="subject"><h2>{escape(prompt)}{which}</h2>'
            f'<div class="row" style="--columns: {len(columns)}">{cells}</div></section>'
        )
    return f'<div class="subjects" style="--columns: {len(columns)}">{blocks}</div>'
