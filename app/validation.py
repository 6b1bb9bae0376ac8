"""Validation images in the tab Compare: runs side by side, at each step.

Training writes these images, so that no scores are needed. The column of the base model has the
images that a run sampled at step 0.
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
from .runs import RunItem, choose_pair, sort_runs

# Largest number of runs side by side
COLUMNS = 6
# Largest number of runs without images whose names are shown; the others are counted.
MAX_NAMES = 6


@dataclass(frozen=True)
class Column:
    """Validation images of a run at a step."""

    title: str
    step: int
    # (prompt, number among the prompt's images) -> path of the image relative to the root
    files: dict[tuple[str, int], str]
    # The same key -> seed of the image's noise; None if the index has none
    seeds: dict[tuple[str, int], int | None]


def build(catalog: Catalog, changed: Any) -> None:
    """Build the widgets of the validation images inside the current `gr.Tab`.

    Args:
        catalog: folders of the viewer.
        changed: event after which the list of runs is filled.
    """
    empty = parts.html("validation-empty", visible=False)
    with gr.Accordion("Validation images", visible=False, elem_id="validation") as body:
        with gr.Row(equal_height=True):
            chosen = gr.Dropdown(
                [],
                label="Runs",
                multiselect=True,
                max_choices=COLUMNS,
                elem_id="validation-runs",
                scale=2,
                min_width=300,
            )
            step = gr.Radio([], label="Images at step", elem_id="validation-step")
        runs_without = parts.html("validation-without", visible=False)
        images = parts.html("validation-images")

    def fill(paths: list[str], chosen_step: int | None) -> Update:
        runs = sort_runs(runs_with_images(catalog))
        if not runs:
            if catalog.scan.scores:  # the tab shows scored images
                text = ""
            elif catalog.scan.runs:
                text = parts.empty_notice(catalog, "No validation images yet", "images")
            else:
                text = parts.empty_notice(catalog, "No images yet", "demo", "train")
            return {empty: parts.notice(text), body: gr.update(visible=False)}
        paths_of_runs = {run.path for run in runs}
        paths = [path for path in paths if path in paths_of_runs]
        if not paths:
            paths = [run.path for run in choose_pair(runs)]
        return {
            empty: gr.update(visible=False),
            body: gr.update(visible=True),
            chosen: gr.update(choices=[(run.name, run.path) for run in runs], value=paths),
            runs_without: parts.notice(runs_without_images(catalog)),
            **show(paths, chosen_step),
        }

    def show(paths: list[str], chosen_step: int | None) -> Update:
        run_of_path = {run.path: run for run in runs_with_images(catalog)}
        runs = [run_of_path[path] for path in paths if path in run_of_path]
        steps = all_steps(runs)
        if chosen_step not in steps:
            chosen_step = first_step(runs)
        choice = gr.update(choices=steps, value=chosen_step, visible=len(steps) > 1)
        return {step: choice, images: images_html(catalog, runs, chosen_step)}

    changed(fill, [chosen, step], [empty, body, chosen, runs_without, step, images], **QUIET)
    gr.on([chosen.input, step.input], show, [chosen, step], [step, images], **QUIET)


def runs_with_images(catalog: Catalog) -> list[RunItem]:
    """Runs that have validation images."""
    return [run for run in catalog.scan.runs if run.steps]


def runs_without_images(catalog: Catalog) -> str:
    """The image runs without validation images, and a fix, as HTML; "" if there is none."""
    names = []
    for run in catalog.scan.runs:
        # A run with prompts will have images.
        if not run.steps and not run.prompts and not run.is_text:
            names.append(run.name)
    if not names:
        return ""
    listing = escape(", ".join(names[:MAX_NAMES]))
    if len(names) > MAX_NAMES:
        listing += f" and {len(names) - MAX_NAMES} more"
    return (
        f'<p class="quiet">Without validation images: {listing}.'
        " Train with <code>--validation_prompt</code> to see a run here.</p>"
    )


def first_step(runs: Sequence[RunItem]) -> int:
    """The step to show first: the last step of which all runs have images, else the last step."""
    steps = all_steps(runs)
    common_steps = [step for step in steps if all(step in run.steps for run in runs)]
    return max(common_steps or steps, default=0)


def all_steps(runs: Sequence[RunItem]) -> list[int]:
    """Steps of which at least one run has images; step 0 only if there are no others."""
    steps: set[int] = set()
    for run in runs:
        steps |= set(run.steps)
    if steps != {0}:
        steps.discard(0)
    return sorted(steps)


def images_html(catalog: Catalog, runs: Sequence[RunItem], step: int) -> str:
    """A block for each prompt, with the images of the base model and of each run, as HTML."""
    columns = [read_column(catalog, run, step, run.name) for run in runs]
    keys: dict[tuple[str, int], None] = {}  # a set in the order of the prompts
    for column in columns:
        keys |= dict.fromkeys(column.files)
    if step > 0:
        # Column of the base model: images of the first run that sampled before training
        for run in runs:
            if 0 in run.steps:
                columns.insert(0, read_column(catalog, run, 0, "base model"))
                break
    blocks = ""
    for prompt, number in keys:
        key = (prompt, number)
        seeds = {column.seeds[key] for column in columns if key in column.seeds}
        # A prompt with a single image is shown without its seed.
        position = ""
        if len(seeds) == 1 and (prompt, 1) in keys:
            (seed,) = seeds
            position = f" ({number + 1})" if seed is None else f", seed {seed}"
        cells = ""
        for column in columns:
            title = column.title
            if len(seeds) > 1 and key in column.seeds:
                title += f", image of seed {column.seeds[key]}"
            file = column.files.get(key)
            uri = None
            missing = "not a prompt of this run"
            if file is not None:
                uri = parts.file_uri_below_root(catalog, file)
                missing = f"no image at step {column.step}"
            picture = parts.image_html(uri, f"{title}: {prompt}{position}", missing)
            cells += f"<figure>{picture}<figcaption>{escape(title)}</figcaption></figure>"
        blocks += (
            f'<section class="subject"><h2>{escape(prompt)}{position}</h2>'
            f'<div class="row" style="--columns: {len(columns)}">{cells}</div></section>'
        )
    return f'<div class="subjects" style="--columns: {len(columns)}">{blocks}</div>'


def read_column(catalog: Catalog, run: RunItem, step: int, title: str) -> Column:
    """Read the index of a run's images at a step; if it is damaged, the column has no images."""
    folder = str(PurePosixPath(run.path) / validation_folder(Path(), step))
    files: dict[tuple[str, int], str] = {}
    seeds: dict[tuple[str, int], int | None] = {}
    counts: Counter[str] = Counter()
    with contextlib.suppress(UserError):
        index = catalog.resolve(f"{folder}/{INDEX}")
        for image in read_index(index, run.record["config"]):
            key = (image.prompt, counts[image.prompt])
            files[key] = f"{folder}/{image.file}"
            seeds[key] = image.seed
            counts[image.prompt] += 1
    return Column(title, step, files, seeds)
