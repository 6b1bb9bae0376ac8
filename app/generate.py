"""The forms that sample images on demand.

The tab Generate samples one prompt by two adapters from the same noise. The grid in the tab Compare
samples one prompt and seed by checkpoints of a run (rows) at strengths of their adapters (columns),
with both kinds of guidance one below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from bilora_diffusion import methods
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import quoted
from bilora_diffusion.core.values import (
    ADAPTER_GUIDANCE,
    BASE_GUIDANCE,
    GUIDANCE_SOURCES,
    STRENGTHS,
    Range,
)
from bilora_diffusion.mini import MINI

from . import parts
from .parts import QUIET, Update
from .runs import PROMPT, RunItem, ordered, pair, suggest_prompt
from .sampling import (
    BASE,
    BaseChoice,
    Request,
    Stopped,
    Work,
    checked,
    drawable,
    exported,
    is_guided,
    sides,
    size_of,
    usual,
)

GUIDANCE_TITLES = {
    ADAPTER_GUIDANCE: "the adapter (what other programs do)",
    BASE_GUIDANCE: "the base model",
}
"""Models of guidance's unconditional prediction as the page calls them."""
COUNTS = Range(64, "each takes as long as one in the tab Generate", at_least=1)
KINDS = {
    ADAPTER_GUIDANCE: "guidance from the adapter",
    BASE_GUIDANCE: "guidance from the base model",
}
"""Kinds of guidance as rows are called."""
Cell = tuple[int, str, float]
"""Step, kind of guidance, strength."""
ROWS = 4
"""Checkpoints that are chosen at first."""


def message(text: str) -> str:
    """What became of the work, as HTML."""
    return f'<p class="quiet">{escape(text)}</p>'


class Tab:
    """The widgets, and what happens when they are used."""

    def __init__(self, work: Work, changed: Any) -> None:
        self.work, self.catalog = work, work.catalog
        self.empty = parts.html("generate-empty", visible=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300) as form:
                prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, elem_id="generate-prompt")
                self.a = gr.Dropdown(label="A", elem_id="generate-a")
                self.b = gr.Dropdown(label="B", elem_id="generate-b")
                number_options: dict[str, Any] = {"precision": 0, "min_width": 90}
                with gr.Row():
                    seed = gr.Number(0, label="Seed", elem_id="generate-seed", **number_options)
                    steps = gr.Number(25, label="Steps", elem_id="generate-steps", **number_options)
                guidance = gr.Slider(
                    0, 12, 4, step=0.5, label="Guidance scale", elem_id="generate-guidance"
                )
                source = gr.Radio(
                    [(text, value) for value, text in GUIDANCE_TITLES.items()],
                    value=ADAPTER_GUIDANCE,
                    label="Guidance from",
                    elem_id="generate-guidance-from",
                )
                base = gr.State(MINI)
                scale = gr.Slider(
                    0, 2, 1, step=0.05, label="Adapter scale", elem_id="generate-scale"
                )
            with gr.Column(scale=5, min_width=300):
                outputs = [parts.html(f"generate-{name}") for name in ("status", "cards", "slider")]
        changed(self.choices, [self.a, self.b], [self.a, self.b, self.empty], **QUIET)
        chosen = [self.a.change, self.b.change]
        suggested = [prompt, steps, guidance, base]
        inputs = [self.a, self.b, base, prompt]
        gr.on(chosen, self.suggest, inputs, suggested, **QUIET)
        inputs = [prompt, self.a, self.b, seed, steps, guidance, source, scale]
        with form:
            work.events("generate", self.generate, prompt, inputs, outputs)

    def choices(self, a: str | None, b: str | None) -> list[Any]:
        """Fill the two lists; what is chosen already stays, and first are LoRA and Bi-LoRA."""
        runs = ordered([run for run in self.catalog.scan.runs if drawable(run)])
        choices = [("base model", BASE), *((run.name, run.path) for run in runs)]
        first = [BASE, BASE, *(run.path for run in pair(runs))][-2:]
        paths = {path for _, path in choices}
        stays = a in paths and b in paths and {a, b} != {BASE}
        a, b = (a, b) if stays else first
        text = "" if runs else parts.empty(self.catalog, "No trained run yet", "demo")
        lists = [gr.update(choices=choices, value=value) for value in (a, b)]
        return [*lists, parts.notice(text)]

    def suggest(self, a: str, b: str, before: str, prompt: str) -> list[Any]:
        """The first chosen run's prompt, unless the user has written one; and steps and guidance
        that are usual for the base model, if it is another than before.
        """
        runs = {run.path: run for run in self.catalog.scan.runs if drawable(run)}
        chosen = [runs[path] for path in (a, b) if path in runs]
        if chosen:
            prompt = suggest_prompt(prompt, chosen[0], [*runs.values()])
        settings: list[Any] = [gr.skip()] * 3
        with suppress(UserError):  # Generate will say it
            base, _, _ = sides(self.catalog, a, b)
            if base.name != before:
                settings = [*usual(base), base.name]
        return [prompt, *settings]

    def generate(
        self,
        number: int,
        prompt: str,
        a: str,
        b: str,
        seed: float | None,
        steps: float | None,
        guidance: float,
        source: str,
        scale: float,
        request: gr.Request,
        progress: Callable[..., Any] = gr.Progress(),  # noqa: B008, how Gradio gives it
    ) -> Iterator[Any]:
        """Draw both sides; yields each as soon as it is there."""
        images: list[Image.Image] = []
        try:
            with self.work.reported():
                drawing = checked(prompt, seed, steps, guidance, scale, source)
                base, chosen, size = sides(self.catalog, a, b)
                drawing = replace(drawing, size=size)
                for label, adapter in chosen:

                    def on_step(step: int, label: str = label) -> None:
                        self.work.check(number, request)
                        progress((step, drawing.steps), desc=label, unit="steps")

                    on_step(0)
                    yield gr.skip(), _cards(chosen, images), gr.skip()
                    images += self.work.models.draw(base, adapter, [drawing], on_step)
            slider = parts.slider([label for label, _ in chosen], images)
            yield message("Done."), _cards(chosen, images), slider
        except Stopped:
            yield message("Cancelled."), gr.skip(), gr.skip()


def _cards(sides: Sequence[tuple[str, Any]], images: Sequence[Image.Image]) -> str:
    addresses = [parts.data_uri(image) for image in images] + [None] * len(sides)
    cards = [
        parts.card(label, address, role)
        for (label, _), address, role in zip(sides, addresses, "AB", strict=False)
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


class Grid:
    """The widgets, and what happens when they are used."""

    def __init__(self, work: Work, changed: Any) -> None:
        self.work, self.catalog = work, work.catalog
        title = "Checkpoints against strengths"
        with (
            gr.Accordion(title, open=False, visible=False, elem_id="grid") as self.body,
            gr.Row(equal_height=False),
        ):
            with gr.Column(scale=2, min_width=300) as form:
                self.run = gr.Dropdown([], label="Run", elem_id="grid-run")
                self.steps = gr.Dropdown(
                    [], label="Checkpoints", multiselect=True, elem_id="grid-steps"
                )
                place: dict[str, Any] = {"elem_id": "grid-strengths"}
                strengths = gr.Textbox("0.5, 0.75, 1, 1.25", label="Strengths", **place)
                self.prompt = gr.Textbox(label="Prompt", lines=2, elem_id="grid-prompt")
                seed = gr.Number(0, label="Seed", precision=0, elem_id="grid-seed")
                both = gr.Checkbox(
                    True,
                    label="Both kinds of guidance",
                    info="A second row for each checkpoint: guidance from the base model.",
                    elem_id="grid-both",
                )
            with gr.Column(scale=5, min_width=300):
                outputs = [parts.html("grid-status"), parts.html("grid-images")]
        choice = [self.run, self.steps, self.prompt]
        gr.on([changed, self.run.input], self.choices, choice, [self.body, *choice], **QUIET)
        with form:
            inputs = [self.run, self.steps, strengths, self.prompt, seed, both]
            work.events("grid", self.draw, self.prompt, inputs, outputs)

    def choices(self, path: str | None, steps: list[int], prompt: str | None) -> Update:
        """Fill the form; what is chosen already stays where the run has it."""
        runs = {run.path: run for run in ordered(with_checkpoints(self.catalog.scan.runs))}
        if not runs:
            return {self.body: gr.update(visible=False)}
        run = runs.get(path or "") or next(iter(runs.values()))
        chosen = [step for step in steps if step in run.checkpoints]
        return {
            self.body: gr.update(visible=True),
            self.run: gr.update(choices=[(r.name, r.path) for r in runs.values()], value=run.path),
            self.steps: gr.update(
                choices=[*run.checkpoints], value=chosen or spread(run.checkpoints, ROWS)
            ),
            self.prompt: suggest_prompt(prompt, run, [*runs.values()]),
        }

    def draw(
        self,
        number: int,
        path: str,
        steps: list[int],
        strengths: str,
        prompt: str,
        seed: float | None,
        both: bool,
        request: gr.Request,
        progress: Callable[..., Any] = gr.Progress(),  # noqa: B008, how Gradio gives it
    ) -> Iterator[Any]:
        """Draw the grid; yields each row as soon as it is there."""
        images: dict[Cell, str] = {}
        try:
            with self.work.reported():
                columns, (run, rows) = read_strengths(strengths), self._chosen(path, steps)
                base = BaseChoice.of_config(run.record["config"])
                kinds = GUIDANCE_SOURCES if both and has_both(run, base) else (ADAPTER_GUIDANCE,)
                COUNTS.check("the number of images", len(rows) * len(kinds) * len(columns))
                drawing = checked(prompt, seed, *usual(base), columns[0])
                drawing = replace(drawing, size=size_of(run))
                requests: list[Request] = []
                for kind in kinds:
                    for strength in columns:
                        requests.append(replace(drawing, scale=strength, guidance_from=kind))
                total = len(rows) * len(requests) * drawing.steps
                for row, step in enumerate(rows):

                    def on_step(step: int, before: int = row * total // len(rows)) -> None:
                        self.work.check(number, request)
                        progress((before + step, total), desc=run.name, unit="steps")

                    on_step(0)
                    yield gr.skip(), table(rows, kinds, columns, images)
                    with exported(self.catalog, run, step) as file:
                        images_of_row = self.work.models.draw(base, file, requests, on_step)
                    cells = [(step, image.guidance_from, image.scale) for image in requests]
                    images |= dict(zip(cells, map(parts.data_uri, images_of_row), strict=True))
            about = f"Done: {drawing.prompt}, seed {drawing.seed}, by {run.name}."
            yield message(about), table(rows, kinds, columns, images)
        except Stopped:
            yield message("Cancelled."), gr.skip()

    def _chosen(self, path: str, steps: Sequence[int]) -> tuple[RunItem, list[int]]:
        runs = {run.path: run for run in with_checkpoints(self.catalog.scan.runs)}
        if path not in runs:
            raise UserError(f"the run {quoted(path)} has gone: choose another")
        if not steps:
            raise UserError("no checkpoint is chosen: choose one or more")
        if missing := sorted({*steps}.difference(runs[path].checkpoints)):
            raise UserError(f"the checkpoint of step {missing[0]} has gone: choose others")
        return runs[path], sorted({*steps})


def has_both(run: RunItem, base: BaseChoice) -> bool:
    """Test that a run's images can have guidance from the base model, too."""
    return not methods.get(run.method).exports_weights and is_guided(base)


def with_checkpoints(runs: Sequence[RunItem]) -> list[RunItem]:
    """The runs on images that have checkpoints."""
    return [run for run in runs if run.checkpoints and not run.is_text]


def spread(steps: Sequence[int], count: int) -> list[int]:
    """At most so many of the steps, evenly apart, with the last."""
    return sorted(steps[:: -len(steps) // count])


def read_strengths(text: str) -> list[float]:
    """Numbers with commas between them, each once.

    Raises:
        UserError: one sentence with the value and the fix.
    """
    strengths = []
    for word in text.split(","):
        try:
            strengths.append(float(word))
        except ValueError:
            fix = "write numbers with commas, such as 0.5, 1"
            raise UserError(f"the strength {quoted(word)} is not a number: {fix}") from None
        STRENGTHS.check("a strength", strengths[-1])
    return list(dict.fromkeys(strengths))


def table(
    rows: Sequence[int],
    kinds: Sequence[str],
    columns: Sequence[float],
    images: Mapping[Cell, str],
) -> str:
    """The grid as HTML: of each step one row for each kind of guidance, below each other.

    Args:
        rows: steps of the checkpoints.
        kinds: models of guidance's unconditional prediction; one alone is not named.
        columns: strengths of the adapter.
        images: addresses.
    """
    head = "".join(f'<th scope="col">{strength:g}</th>' for strength in columns)
    body = ""
    for step in rows:
        for kind in kinds:
            title, name = f"{step}", f"step {step}"
            if len(kinds) > 1:
                title += f"<br>{KINDS[kind]}"
                name += f", {KINDS[kind]}"
            body += f'<tr><th scope="row">{title}</th>'
            for strength in columns:
                address = images.get((step, kind, strength))
                body += f"<td>{parts.image(address, f'{name}, strength {strength:g}')}</td>"
            body += "</tr>"
    return (
        f'<div class="scroll"><table class="grid" style="--columns: {len(columns)}">'
        f'<thead><tr><th scope="col">step \\ strength</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
