"""The Compare tab's upper part: validation images of runs side by side, over the steps.

It needs no scores: training leaves the images. The base model's column is a run's images of step 0.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any

import gradio as gr

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.image.validation import INDEX, read_index
from bilora_diffusion.run.record import validation_folder

from . import parts
from .catalog import Catalog
from .parts import QUIET, Update
from .runs import RunItem, ordered, pair

COLUMNS = 6
"""Runs that fit side by side."""
MAX_NAMES = 6
"""Runs without images that are named; the others are counted."""


def build(catalog: Catalog, changed: Any) -> None:
    """Build the part inside the current ``gr.Tab``."""
    empty = parts.html("validation-empty", visible=False)
    with gr.Accordion("Validation images", visible=False, elem_id="validation") as body:
        with gr.Row(equal_height=True):
            place: dict[str, Any] = {"elem_id": "validation-runs", "scale": 2, "min_width": 300}
            chosen = gr.Dropdown([], label="Runs", multiselect=True, max_choices=COLUMNS, **place)
            step = gr.Radio([], label="Images at step", elem_id="validation-step")
        runs_without = parts.html("validation-without", visible=False)
        images = parts.html("validation-images")

    def fill(paths: list[str], chosen_step: int | None) -> Update:
        runs = ordered(with_images(catalog))
        if not runs:
            names = ["images"] if catalog.scan.runs else ["demo", "train"]
            title = "No validation images yet" if catalog.scan.runs else "No images yet"
            text = "" if catalog.scan.scores else parts.empty(catalog, title, *names)
            return {empty: parts.notice(text), body: gr.update(visible=False)}
        known_paths = {run.path for run in runs}
        paths = [path for path in paths if path in known_paths]
        if not paths:
            paths = [run.path for run in pair(runs)]
        return {
            empty: gr.update(visible=False),
            body: gr.update(visible=True),
            chosen: gr.update(choices=[(run.name, run.path) for run in runs], value=paths),
            runs_without: parts.notice(without_images(catalog)),
            **show(paths, chosen_step),
        }

    def show(paths: list[str], chosen_step: int | None) -> Update:
        run_of = {run.path: run for run in with_images(catalog)}
        runs = [run_of[path] for path in paths if path in run_of]
        steps = common_steps(runs)
        if chosen_step not in steps:
            chosen_step = steps[-1] if steps else 0
        choice = gr.update(choices=steps, value=chosen_step, visible=len(steps) > 1)
        return {step: choice, images: table(catalog, runs, chosen_step)}

    changed(fill, [chosen, step], [empty, body, chosen, runs_without, step, images], **QUIET)
    gr.on([chosen.input, step.input], show, [chosen, step], [step, images], **QUIET)


def with_images(catalog: Catalog) -> list[RunItem]:
    """Runs that have validation images."""
    return [run for run in catalog.scan.runs if run.steps]


def without_images(catalog: Catalog) -> str:
    """The runs that can't be shown here and the reason, as HTML; "" without one."""
    runs = [run for run in catalog.scan.runs if not (run.steps or run.prompts or run.is_text)]
    names = [run.name for run in runs]
    if not names:
        return ""
    listed = ", ".join(map(escape, names[:MAX_NAMES]))
    if len(names) > MAX_NAMES:
        listed += f" and {len(names) - MAX_NAMES} more"
    return (
        f'<p class="quiet">Without validation images: {listed}.'
        " Train with <code>--validation_prompt</code> to see a run here.</p>"
    )


def common_steps(runs: Sequence[RunItem]) -> list[int]:
    """Steps after the start at which any of the runs has images; only the start where none has."""
    steps = sorted({step for run in runs for step in run.steps})
    return [step for step in steps if step] or steps


@dataclass(frozen=True)
class Column:
    """The images of a run at a step, by prompt and by how many images of the prompt come before."""

    title: str
    step: int
    files: dict[tuple[str, int], str]  # relative to the root


def table(catalog: Catalog, runs: Sequence[RunItem], step: int) -> str:
    """One block for each prompt, with the images of the base model and each run, as HTML."""
    columns = [read_column(catalog, run, step, run.name) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column.files)
    # Column of the base model: images that one of the runs made before its first step.
    untrained = next((run for run in runs if step and 0 in run.steps), None)
    if untrained is not None:
        columns.insert(0, read_column(catalog, untrained, 0, "base model"))
    blocks = ""
    for prompt, number in keys:
        cells = ""
        for column in columns:
            file = column.files.get((prompt, number))
            address, missing = None, "not a prompt of this run"
            if file is not None:
                address = parts.address_below(catalog, file)
                missing = f"no image at step {column.step}"
            picture = parts.image(address, f"{column.title}: {prompt}", missing)
            cells += f"<figure>{picture}<figcaption>{escape(column.title)}</figcaption></figure>"
        position = f" ({number + 1})" if number else ""
        blocks += (
            f'<section class="subject"><h2>{escape(prompt)}{position}</h2>'
            f'<div class="row" style="--columns: {len(columns)}">{cells}</div></section>'
        )
    return f'<div class="subjects" style="--columns: {len(columns)}">{blocks}</div>'


def read_column(catalog: Catalog, run: RunItem, step: int, title: str) -> Column:
    """The images of a run at a step by the index that the run wrote; none where that is damaged."""
    folder = str(PurePosixPath(run.path) / validation_folder(Path(), step))
    files: dict[tuple[str, int], str] = {}
    count: Counter[str] = Counter()
    with contextlib.suppress(UserError):
        index = catalog.resolve(f"{folder}/{INDEX}")
        for image in read_index(index, run.record["config"]):
            files[image.prompt, count[image.prompt]] = f"{folder}/{image.file}"
            count[image.prompt] += 1
    return Column(title, step, files)
