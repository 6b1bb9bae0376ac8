"""Validation images in the tab Compare: runs side by side, over the steps.

Training leaves these images, so that no scores are needed. The base model's column has the images
that a run sampled at step 0.
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

# Runs that fit side by side.
COLUMNS = 6
# Runs without images that are named; the others are counted.
MAX_NAMES = 6


@dataclass(frozen=True)
class Column:
    """Images of a run at a step."""

    title: str
    step: int
    # Files relative to the root, by prompt and by number among the prompt's images
    files: dict[tuple[str, int], str]
    # The seed of each image's noise, by the same; None where the index has none
    seeds: dict[tuple[str, int], int | None]


def build(catalog: Catalog, changed: Any) -> None:
    """Build this part inside the current `gr.Tab`.

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
        runs = ordered(with_images(catalog))
        if not runs:
            if catalog.scan.scores:  # the tab has scored images to show
                text = ""
            elif catalog.scan.runs:
                text = parts.empty(catalog, "No validation images yet", "images")
            else:
                text = parts.empty(catalog, "No images yet", "demo", "train")
            return {empty: parts.notice(text), body: gr.update(visible=False)}
        paths_of_runs = {run.path for run in runs}
        paths = [path for path in paths if path in paths_of_runs]
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
        run_of_path = {run.path: run for run in with_images(catalog)}
        runs = [run_of_path[path] for path in paths if path in run_of_path]
        steps = all_steps(runs)
        if chosen_step not in steps:
            chosen_step = first_step(runs)
        choice = gr.update(choices=steps, value=chosen_step, visible=len(steps) > 1)
        return {step: choice, images: table(catalog, runs, chosen_step)}

    changed(fill, [chosen, step], [empty, body, chosen, runs_without, step, images], **QUIET)
    gr.on([chosen.input, step.input], show, [chosen, step], [step, images], **QUIET)


def with_images(catalog: Catalog) -> list[RunItem]:
    """Runs that have validation images."""
    return [run for run in catalog.scan.runs if run.steps]


def without_images(catalog: Catalog) -> str:
    """The runs of images that can't be shown here, and a fix, as HTML; "" if there is none."""
    names = []
    for run in catalog.scan.runs:
        # One with prompts will have images.
        if not run.steps and not run.prompts and not run.is_text:
            names.append(run.name)
    if not names:
        return ""
    listed = escape(", ".join(names[:MAX_NAMES]))
    if len(names) > MAX_NAMES:
        listed += f" and {len(names) - MAX_NAMES} more"
    return (
        f'<p class="quiet">Without validation images: {listed}.'
        " Train with <code>--validation_prompt</code> to see a run here.</p>"
    )


def first_step(runs: Sequence[RunItem]) -> int:
    """The step to show first: the last at which all runs have images, else the last of any."""
    steps = all_steps(runs)
    common_steps = [step for step in steps if all(step in run.steps for run in runs)]
    return max(common_steps or steps, default=0)


def all_steps(runs: Sequence[RunItem]) -> list[int]:
    """Steps at which any of the runs has images: those after step 0, or this one alone."""
    steps: set[int] = set()
    for run in runs:
        steps |= set(run.steps)
    if steps != {0}:
        steps.discard(0)
    return sorted(steps)


def table(catalog: Catalog, runs: Sequence[RunItem], step: int) -> str:
    """A block for each prompt, with the images of the base model and of each run, as HTML."""
    columns = [read_column(catalog, run, step, run.name) for run in runs]
    keys: dict[tuple[str, int], None] = {}  # in the order in which they come
    for column in columns:
        keys |= dict.fromkeys(column.files)
    if step > 0:
        # Column of the base model: images of the first run that sampled some before training.
        for run in runs:
            if 0 in run.steps:
                columns.insert(0, read_column(catalog, run, 0, "base model"))
                break
    blocks = ""
    for prompt, number in keys:
        key = (prompt, number)
        seeds = {column.seeds[key] for column in columns if key in column.seeds}
        # A prompt with a single image needs no seed to tell it apart.
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
            address = None
            missing = "not a prompt of this run"
            if file is not None:
                address = parts.address_below(catalog, file)
                missing = f"no image at step {column.step}"
            picture = parts.image(address, f"{title}: {prompt}{position}", missing)
            cells += f"<figure>{picture}<figcaption>{escape(title)}</figcaption></figure>"
        blocks += (
            f'<section class="subject"><h2>{escape(prompt)}{position}</h2>'
            f'<div class="row" style="--columns: {len(columns)}">{cells}</div></section>'
        )
    return f'<div class="subjects" style="--columns: {len(columns)}">{blocks}</div>'


def read_column(catalog: Catalog, run: RunItem, step: int, title: str) -> Column:
    """Read the index of a run's images at a step; a damaged one gives a column without images."""
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
