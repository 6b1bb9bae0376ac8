"""The grid of checkpoints against strengths in the tab Compare, sampled on demand.

All images have the same prompt and seed. Each row is a checkpoint of a run with one kind of
guidance; each column is a strength of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from bilora_diffusion import methods
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import quoted
from bilora_diffusion.core.values import ADAPTER_GUIDANCE, STRENGTHS, Range, guidance_title
from eval.clip_scores.settings import usual
from eval.sampler import sampler_of_runs

from . import parts
from .generate import Stopped, Work, message, placeholder
from .parts import QUIET, Update
from .runs import RunItem, sort_runs, suggest_prompt
from .sampling import (
    BaseChoice,
    Request,
    read_form,
    read_source,
    temporary_export,
    training_size,
)

# Allowed numbers of images in a grid
IMAGE_COUNTS = Range(64, "each takes as long as an image in the tab Generate", at_least=1)
# Step of the checkpoint, model of the unconditional prediction, and strength of the adapter
Cell = tuple[int, float | str, float]
# Number of checkpoints chosen by default
FIRST_CHECKPOINTS = 4


class Grid:
    """The grid in the tab Compare: its widgets and their events.

    Args:
        work: the sampler and the browsers' jobs.
        changed: event after which the list of runs is filled.
    """

    def __init__(self, work: Work, changed: Any) -> None:
        self.work = work
        self.catalog = work.catalog
        title = "Checkpoints against strengths"
        with (
            gr.Accordion(title, open=False, visible=False, elem_id="grid") as self.body,
            gr.Row(equal_height=False),
        ):
            # Left: the form
            with gr.Column(scale=2, min_width=300) as form:
                self.run = gr.Dropdown([], label="Run", elem_id="grid-run")
                self.steps = gr.Dropdown(
                    [], label="Checkpoints", multiselect=True, elem_id="grid-steps"
                )
                strengths = gr.Textbox(
                    "0.5, 0.75, 1, 1.25", label="Strengths", elem_id="grid-strengths"
                )
                self.prompt = gr.Textbox(label="Prompt", lines=2, elem_id="grid-prompt")
                seed = gr.Number(0, label="Seed", precision=0, elem_id="grid-seed")
                sources = gr.Textbox(
                    "adapter, base",
                    label="Guidance from",
                    info="Each value adds a row per checkpoint: adapter, base, or the adapter's"
                    " strength in the unconditional prediction, such as 0.5.",
                    elem_id="grid-guidance-from",
                )
            # Right: the images
            with gr.Column(scale=5, min_width=300):
                outputs = [parts.html("grid-status"), parts.html("grid-images")]
                outputs[0].value = placeholder(
                    "Press Generate to see a table here, with a row of images for each checkpoint"
                    " and a column for each strength."
                )
        choice = [self.run, self.steps, self.prompt]
        gr.on([changed, self.run.input], self.fill, choice, [self.body, *choice], **QUIET)
        with form:
            inputs = [self.run, self.steps, strengths, self.prompt, seed, sources]
            work.events("grid", self.sample, self.prompt, inputs, outputs)

    def fill(self, path: str | None, steps: list[int], prompt: str | None) -> Update:
        """Fill the form, and keep the choices that still exist."""
        runs = sort_runs(runs_with_checkpoints(self.catalog.scan.runs))
        if not runs:
            return {self.body: gr.update(visible=False)}
        run = runs[0]
        for candidate in runs:
            if candidate.path == path:
                run = candidate
        chosen_steps = [step for step in steps if step in run.checkpoints]
        if not chosen_steps:
            chosen_steps = evenly_spaced(run.checkpoints, FIRST_CHECKPOINTS)
        run_choices = [(item.name, item.path) for item in runs]
        return {
            self.body: gr.update(visible=True),
            self.run: gr.update(choices=run_choices, value=run.path),
            self.steps: gr.update(choices=list(run.checkpoints), value=chosen_steps),
            self.prompt: suggest_prompt(prompt, run, runs),
        }

    def sample(
        self,
        number: int,
        path: str,
        steps: list[int],
        strengths: str,
        prompt: str,
        seed: float | None,
        sources: str,
        request: gr.Request,
        progress: Callable[..., Any] = gr.Progress(),  # noqa: B008, how Gradio gives it
    ) -> Iterator[Any]:
        """Sample the grid, and show each row as soon as it is sampled.

        Yields:
            HTML of the outputs: status, grid.
        """
        uris: dict[Cell, str] = {}
        try:
            with self.work.errors_on_page():
                columns = read_strengths(strengths)
                run, rows = self._chosen(path, steps)
                base = BaseChoice.from_config(run.record["config"])
                model = base.read_base_model()
                sampler = sampler_of_runs([run.record["config"]])
                sampler_steps, guidance = sampler.usual(*usual(model))
                is_guided = model.family.is_guided(guidance, model.index, model.configs)
                kinds = read_sources(sources)
                # A run that trained all weights has no adapter to scale.
                has_adapter = not methods.get(run.method).exports_weights
                if not (has_adapter and is_guided):
                    kinds = [ADAPTER_GUIDANCE]
                IMAGE_COUNTS.check("the number of images", len(rows) * len(kinds) * len(columns))
                first_request = read_form(prompt, seed, sampler_steps, guidance, columns[0])
                first_request = replace(first_request, size=training_size(run), sampler=sampler)
                requests: list[Request] = []  # the same for each row
                for kind in kinds:
                    for strength in columns:
                        requests.append(replace(first_request, scale=strength, guidance_from=kind))
                steps_of_row = len(requests) * first_request.steps
                for row, step in enumerate(rows):
                    steps_before = row * steps_of_row

                    def on_step(step: int, steps_before: int = steps_before) -> None:
                        self.work.check(number, request)
                        total = len(rows) * steps_of_row
                        progress((steps_before + step, total), desc=run.name, unit="steps")

                    on_step(0)
                    yield gr.skip(), grid_html(rows, kinds, columns, uris)
                    with temporary_export(self.catalog, run, step) as file:
                        images = self.work.sampler.sample(base, file, requests, on_step)
                    for item, image in zip(requests, images, strict=True):
                        cell = (step, item.guidance_from, item.scale)
                        uris[cell] = parts.data_uri(image)
            text = (
                f"Done: {first_request.prompt}, seed {first_request.seed}, sampled with {run.name}."
            )
            yield message(text), grid_html(rows, kinds, columns, uris)
        except Stopped:
            yield message("Cancelled."), gr.skip()

    def _chosen(self, path: str, steps: Sequence[int]) -> tuple[RunItem, list[int]]:
        """Return the chosen run and the steps of its chosen checkpoints, in order.

        Raises:
            UserError: the run or a checkpoint no longer exists, or no checkpoint is chosen.
        """
        runs = {run.path: run for run in runs_with_checkpoints(self.catalog.scan.runs)}
        if path not in runs:
            raise UserError(f"the run {quoted(path)} no longer exists: choose another")
        if not steps:
            raise UserError("no checkpoint is chosen: choose at least one")
        chosen_steps = sorted(set(steps))
        for step in chosen_steps:
            if step not in runs[path].checkpoints:
                raise UserError(f"the checkpoint at step {step} no longer exists: choose another")
        return runs[path], chosen_steps


def runs_with_checkpoints(runs: Sequence[RunItem]) -> list[RunItem]:
    """Return the runs of image models that have checkpoints."""
    return [run for run in runs if run.checkpoints and not run.is_text]


def evenly_spaced(steps: Sequence[int], count: int) -> list[int]:
    """Choose at most `count` evenly spaced steps, including the last one."""
    # Every ceil(n / count)-th of n steps, backwards from the last one
    stride = -(-len(steps) // count)
    return sorted(steps[::-stride])


def read_strengths(text: str) -> list[float]:
    """Read numbers separated by commas, without duplicates.

    Raises:
        UserError: a word is not a number, or out of range.
    """
    strengths = []
    for word in text.split(","):
        try:
            strengths.append(float(word))
        except ValueError:
            fix = "write numbers separated by commas, such as 0.5, 1"
            raise UserError(f"the strength {quoted(word)} is not a number: {fix}") from None
        STRENGTHS.check("a strength", strengths[-1])
    return list(dict.fromkeys(strengths))


def read_sources(text: str) -> list[float | str]:
    """Read models of the unconditional prediction, separated by commas, without duplicates.

    Raises:
        UserError: a word is not adapter, base, or a strength in the allowed range.
    """
    sources = [read_source(word.strip()) for word in text.split(",")]
    return list(dict.fromkeys(sources))


def grid_html(
    rows: Sequence[int],
    kinds: Sequence[float | str],
    columns: Sequence[float],
    uris: Mapping[Cell, str],
) -> str:
    """Return the grid as HTML, with a row for each step and kind of guidance.

    Args:
        rows: steps of the checkpoints.
        kinds: models of the unconditional prediction. A single one is not named in the rows.
        columns: strengths of the adapter.
        uris: URIs of the images sampled so far.
    """
    head = "".join(f'<th scope="col">{strength:g}</th>' for strength in columns)
    body = ""
    for step in rows:
        for kind in kinds:
            title = f"{step}"
            label = f"step {step}"
            if len(kinds) > 1:
                title += f"<br>guidance from {guidance_title(kind)}"
                label += f", guidance from {guidance_title(kind)}"
            body += f'<tr><th scope="row">{title}</th>'
            for strength in columns:
                uri = uris.get((step, kind, strength))
                body += f"<td>{parts.image_html(uri, f'{label}, strength {strength:g}')}</td>"
            body += "</tr>"
    return (
        f'<div class="scroll"><table class="grid" style="--columns: {len(columns)}">'
        f'<thead><tr><th scope="col">step \\ strength</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
