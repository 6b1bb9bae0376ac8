"""The Generate tab: one prompt, two adapters, the same noise. And drawing that a browser asks for
in any tab: one piece of work at a time, shown as it goes on, and ended by whoever asked for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from bilora_diffusion.core.errors import TrainingError, UserError
from bilora_diffusion.core.values import ADAPTER_GUIDANCE, BASE_GUIDANCE
from bilora_diffusion.mini import MINI

from . import parts
from .catalog import Catalog
from .drawing import BASE, Pipelines, checked, drawable, sides, usual
from .parts import QUIET
from .runs import PROMPT, ordered, pair, suggest_prompt

GUIDANCE_TITLES = {
    ADAPTER_GUIDANCE: "the adapter (what other programs do)",
    BASE_GUIDANCE: "the base model",
}
"""Models of guidance's unconditional prediction as the page calls them."""


class Stopped(Exception):
    """Work was stopped by whoever asked for it."""


class Work:
    """The pipeline that all parts of the page draw with, and each browser's current work.

    Args:
        device: such as "cuda:1"; None for the best.
    """

    def __init__(self, catalog: Catalog, page: gr.Blocks, device: str | None) -> None:
        self.catalog, self.models = catalog, Pipelines(device)
        self.numbers, self.current = itertools.count(1), dict[str | None, int]()
        page.unload(self.stop)

    def events(
        self,
        name: str,
        draw: Callable[..., Iterator[Any]],
        prompt: gr.Textbox,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
    ) -> None:
        """Two buttons, and what they and the prompt's Enter key do.

        Args:
            name: begins the buttons' ids.
            draw: called with the work's number and what is ``asked``.
            outputs: HTML of ``draw``, which is cleared first; progress is shown on the first.
        """

        def start(request: gr.Request) -> list[Any]:
            return [self.begin(request), *([""] * len(outputs))]

        with gr.Row():
            go = gr.Button("Generate", variant="primary", elem_id=f"{name}-go")
            cancel = gr.Button("Cancel", elem_id=f"{name}-cancel")
        number = gr.Number(0, visible=False)
        # No `cancels` of Gradio's here: it leaves the next event in error now and then.
        pressed = [go.click, prompt.submit]
        started = gr.on(pressed, start, [], [number, *outputs], queue=False, **QUIET)
        started.then(
            draw,
            [number, *inputs],
            [*outputs],
            show_progress="minimal",
            show_progress_on=outputs[0],
            trigger_mode="multiple",
            concurrency_id="drawing",
            concurrency_limit=1,
            api_visibility="private",
        )
        cancel.click(self.stop, [], [], queue=False, **QUIET)

    def begin(self, request: gr.Request) -> int:
        """A number for new work, which ends this browser's earlier work."""
        self.current[request.session_hash] = number = next(self.numbers)
        return number

    def stop(self, request: gr.Request) -> None:
        """End what this browser asked for, before its next step."""
        self.current.pop(request.session_hash, None)

    def check(self, number: int, request: gr.Request) -> None:
        """Raise ``Stopped`` unless this is still the browser's current work."""
        if self.current.get(request.session_hash) != number:
            raise Stopped

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Context whose errors the page shows in one sentence."""
        try:
            yield
        except (UserError, TrainingError) as error:
            text = escape(self.catalog.plain(error))
            raise gr.Error(text, print_exception=False) from error


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
