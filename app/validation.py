"""Validation images in the tab Compare: runs side by side, at a chosen step.

Training writes these images, so no scores are needed. The column of the base model shows the images
that a run sampled at step 0. If prompts are captions of the miniature's held-out icons, another
column shows these icons.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any

import gradio as gr

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.values import guidance_title
from bilora_diffusion.image.validation import INDEX, ValidationImage, read_index
from bilora_diffusion.mini import MINI
from bilora_diffusion.run.record import validation_folder
from eval.clip_scores import prompts
from eval.clip_scores.measure import truth_pictures

from . import parts
from .catalog import Catalog
from .parts import QUIET, Update
from .runs import RunItem, choose_pair, sort_runs

# Maximum number of runs side by side
COLUMNS = 6
# Maximum number of runs without images that are named; any others are only counted.
MAX_NAMES = 6
# Prompt, and number of the image among those of the prompt
Key = tuple[str, int]


@dataclass(frozen=True)
class Column:
    """Validation images of a run at a step."""

    title: str
    step: int
    # Folder of the images, relative to the root
    folder: str
    images: dict[Key, ValidationImage]


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
    """Return the runs that have validation images."""
    return [run for run in catalog.scan.runs if run.steps]


def runs_without_images(catalog: Catalog) -> str:
    """Return a note on image runs without validation images, as HTML; "" if there are none."""
    names = []
    for run in catalog.scan.runs:
        # A run with prompts will still get its images.
        if not run.steps and not run.prompts and not run.is_text:
            names.append(run.name)
    if not names:
        return ""
    listing = escape(", ".join(names[:MAX_NAMES]))
    if len(names) > MAX_NAMES:
        listing += f" and {len(names) - MAX_NAMES} more"
    return (
        f'<p class="quiet">Runs without validation images: {listing}.'
        " To see a run here, train it with <code>--validation_prompt</code>.</p>"
    )


def first_step(runs: Sequence[RunItem]) -> int:
    """Return the step to show first: the last one with images of all runs, or else the last one."""
    steps = all_steps(runs)
    common_steps = [step for step in steps if all(step in run.steps for run in runs)]
    return max(common_steps or steps, default=0)


def all_steps(runs: Sequence[RunItem]) -> list[int]:
    """Return the steps with images of any run; step 0 is included only if it is the only one."""
    steps: set[int] = set()
    for run in runs:
        steps |= set(run.steps)
    if steps != {0}:
        steps.discard(0)
    return sorted(steps)


def images_html(catalog: Catalog, runs: Sequence[RunItem], step: int) -> str:
    """Return a section for each prompt, as HTML: the base model, each run, and the ground truth."""
    columns = [read_column(catalog, run, step, run.name) for run in runs]
    numbers_by_prompt: dict[str, set[int]] = {}  # in the order of the prompts
    for column in columns:
        for prompt, number in column.images:
            numbers_by_prompt.setdefault(prompt, set()).add(number)
    base = read_base_column(catalog, runs, numbers_by_prompt)
    if step > 0 and base is not None:
        columns.insert(0, base)
    truths = read_truths(parts.heldout_set_of_miniature(runs))
    has_truth = bool(numbers_by_prompt.keys() & truths.keys())
    sections = ""
    for prompt, numbers in numbers_by_prompt.items():
        rows = rows_html(catalog, columns, prompt, sorted(numbers), truths.get(prompt))
        sections += f'<section class="subject"><h2>{escape(prompt)}</h2>{rows}</section>'
    count = len(columns) + has_truth
    line = f'<p class="quiet">{escape(", ".join([f"Step {step}", *shared_facts(columns)]))}</p>'
    return f'{line}<div class="subjects" style="--columns: {count}">{sections}</div>'


def shared_facts(columns: Sequence[Column]) -> list[str]:
    """Return the seed and the kind of guidance, each only if it is the same for all images."""
    facts_of_images = []
    for column in columns:
        facts_of_images += [image_labels(image) for image in column.images.values()]
    shared = []
    for values in zip(*facts_of_images, strict=True):
        if len(set(values)) == 1 and values[0]:
            shared.append(values[0])
    return shared


def rows_html(
    catalog: Catalog,
    columns: Sequence[Column],
    prompt: str,
    numbers: Sequence[int],
    truth_uri: str | None,
) -> str:
    """Return a row for each image of a prompt, as HTML.

    If a prompt has several rows, they are labeled with the seed or guidance in which they differ.
    If the images within a row differ in the seed or guidance, each image is labeled instead.
    """
    facts_of_rows = [row_facts(columns, (prompt, number)) for number in numbers]
    rows = ""
    for number, facts in zip(numbers, facts_of_rows, strict=True):
        labels = []
        for index, values in enumerate(facts):
            is_different = any(row[index] != values for row in facts_of_rows)
            if len(values) == 1 and is_different:
                labels += values
        if len(numbers) > 1 and not labels:
            labels.append(f"image {number + 1}")
        label = ", ".join(labels)
        cells = ""
        for column in columns:
            title = column.title
            uri = None
            missing = "not a prompt of this run"
            image = column.images.get((prompt, number))
            if image is not None:
                for fact, values in zip(image_labels(image), facts, strict=True):
                    if fact and len(values) > 1:
                        title += f", image of {fact}"
                uri = parts.file_uri_below_root(catalog, f"{column.folder}/{image.file}")
                missing = f"no image at step {column.step}"
            text = f"{title}: {prompt}"
            if label:
                text += f", {label}"
            picture = parts.image_html(uri, text, missing)
            cells += f"<figure>{picture}<figcaption>{escape(title)}</figcaption></figure>"
        if truth_uri:
            picture = parts.image_html(truth_uri, f"ground truth: {prompt}")
            cells += f"<figure>{picture}<figcaption>ground truth</figcaption></figure>"
        if label:
            rows += f"<h3>{escape(label)}</h3>"
        rows += f'<div class="row">{cells}</div>'
    return rows


def row_facts(columns: Sequence[Column], key: Key) -> list[list[str]]:
    """Return the distinct seeds and the distinct kinds of guidance of an image in all columns."""
    images = [column.images[key] for column in columns if key in column.images]
    facts_of_images = [image_labels(image) for image in images]
    return [list(dict.fromkeys(values)) for values in zip(*facts_of_images, strict=True)]


def image_labels(image: ValidationImage) -> tuple[str, str]:
    """Return the seed and the guidance of an image as texts; "" if unknown."""
    seed = "" if image.seed is None else f"seed {image.seed}"
    guidance = ""
    if image.guidance_from is not None:
        guidance = f"guidance from {guidance_title(image.guidance_from)}"
        if image.guidance is not None:
            guidance += f", scale {image.guidance:g}"
    return seed, guidance


@lru_cache
def read_truths(heldout_set: str | None) -> dict[str, str]:
    """Return the held-out icons of a miniature's set: caption -> URI; {} without a set."""
    if heldout_set is None:
        return {}
    pictures = truth_pictures(prompts.read(heldout_set), MINI)
    return {text: parts.data_uri(picture) for text, picture in pictures.items()}


def read_base_column(
    catalog: Catalog, runs: Sequence[RunItem], prompts_of_page: Collection[str]
) -> Column | None:
    """Read the base model's images, which a run sampled before training; chosen runs come first.

    Args:
        catalog: folders of the viewer.
        runs: chosen runs.
        prompts_of_page: prompts of the chosen runs' images.

    Returns:
        The column; None if no run of the same base model has such images of any of the prompts.
    """
    bases = [run.record["config"].get("pretrained_model_name_or_path") for run in runs]
    for run in [*runs, *runs_with_images(catalog)]:
        if 0 in run.steps and run.record["config"].get("pretrained_model_name_or_path") in bases:
            column = read_column(catalog, run, 0, "base model")
            if any(prompt in prompts_of_page for prompt, _ in column.images):
                return column
    return None


def read_column(catalog: Catalog, run: RunItem, step: int, title: str) -> Column:
    """Read the index of a run's images at a step; if it is damaged, the column has no images."""
    folder = str(PurePosixPath(run.path) / validation_folder(Path(), step))
    images: dict[Key, ValidationImage] = {}
    counts: Counter[str] = Counter()
    with contextlib.suppress(UserError):
        index = catalog.resolve(f"{folder}/{INDEX}")
        for image in read_index(index, run.record["config"]):
            images[image.prompt, counts[image.prompt]] = image
            counts[image.prompt] += 1
    return Column(title, step, folder, images)
