"""The Generate tab: one prompt, two adapters, the same noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from bilora_diffusion.errors import TrainingError, UserError
from bilora_diffusion.mini import MINI

from . import parts
from .catalog import Catalog
from .drawing import BASE, Pipelines, checked, drawable, sides, usual
from .parts import QUIET
from .runs import ordered, pair

PROMPT = "a TOK icon of a rabbit, in the style of TOK"


class Stopped(Exception):
    """Work was stopped by whoever asked for it."""


class Tab:
    """The widgets, and what happens when they are used."""

    def __init__(self, catalog: Catalog, page: gr.Blocks, changed: Any, device: str | None) -> None:
        self.catalog, self.models = catalog, Pipelines(device)
        self.numbers, self.current = itertools.count(1), dict[str | None, int]()
        self._widgets()
        self._events(page, changed)

    def _widgets(self) -> None:
        self.empty = parts.html("generate-empty", visible=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, elem_id="generate-prompt")
                self.a = gr.Dropdown(label="A", elem_id="generate-a")
                self.b = gr.Dropdown(label="B", elem_id="generate-b")
                whole: dict[str, Any] = {"precision": 0, "min_width": 90}
                with gr.Row():
                    self.seed = gr.Number(0, label="Seed", elem_id="generate-seed", **whole)
                    self.steps = gr.Number(25, label="Steps", elem_id="generate-steps", **whole)
                self.guidance = gr.Slider(
                    0, 12, 4, step=0.5, label="Guidance scale", elem_id="generate-guidance"
                )
                self.base = gr.State(MINI)
                self.number = gr.Number(0, visible=False)
                self.scale = gr.Slider(
                    0, 2, 1, step=0.05, label="Adapter scale", elem_id="generate-scale"
                )
                with gr.Row():
                    self.go = gr.Button("Generate", variant="primary", elem_id="generate-go")
                    self.cancel = gr.Button("Cancel", elem_id="generate-cancel")
            with gr.Column(scale=5, min_width=300):
                self.status = parts.html("generate-status")
                self.cards = parts.html("generate-cards")
                self.slider = parts.html("generate-slider")

    def _events(self, page: gr.Blocks, changed: Any) -> None:
        changed(self.choices, [self.a, self.b], [self.a, self.b, self.empty], **QUIET)
        # Where another base model is chosen; else what was set stays.
        gr.on(
            [self.a.change, self.b.change],
            self.usual,
            [self.a, self.b, self.base],
            [self.steps, self.guidance, self.base],
            **QUIET,
        )
        asked = [self.number, self.prompt, self.a, self.b, self.seed]
        asked += [self.steps, self.guidance, self.scale]
        outputs = [self.status, self.cards, self.slider]
        # No `cancels` of Gradio's here: it leaves the next event in error now and then.
        started = gr.on(
            [self.go.click, self.prompt.submit], self.begin, [], self.number, queue=False, **QUIET
        )
        started.then(
            self.generate,
            asked,
            outputs,
            show_progress="minimal",
            show_progress_on=self.status,
            trigger_mode="multiple",
            concurrency_limit=1,
            api_visibility="private",
        )
        self.cancel.click(self.stop, [], [], queue=False, **QUIET)
        page.unload(self.stop)

    def choices(self, a: str | None, b: str | None) -> list[Any]:
        """Fill the two lists; what is chosen already stays, and first are LoRA and Bi-LoRA."""
        runs = ordered([run for run in self.catalog.now.runs if drawable(run)])
        named = [("base model", BASE), *((run.name, run.path) for run in runs)]
        first = [BASE, BASE, *(run.path for run in pair(runs))][-2:]
        there = {path for _, path in named}
        stays = a in there and b in there and {a, b} != {BASE}
        a, b = (a, b) if stays else first
        text = "" if runs else parts.empty(self.catalog, "No trained run yet", "demo")
        return [*(gr.update(choices=named, value=one) for one in (a, b)), parts.notice(text)]

    def usual(self, a: str, b: str, before: str) -> list[Any]:
        """Steps and guidance that are usual for the base model, if it is another than before."""
        try:
            base, _, _ = sides(self.catalog, a, b)
            if base.name != before:
                return [*usual(base), base.name]
        except UserError:  # Generate will say it
            pass
        return [gr.skip()] * 3

    def begin(self, request: gr.Request) -> int:
        """A number for new work, which ends this browser's earlier work."""
        self.current[request.session_hash] = number = next(self.numbers)
        return number

    def generate(
        self,
        number: int,
        prompt: str,
        a: str,
        b: str,
        seed: float | None,
        steps: float | None,
        guidance: float,
        scale: float,
        request: gr.Request,
        progress: Callable[..., Any] = gr.Progress(),  # noqa: B008, how Gradio gives it
    ) -> Iterator[Any]:
        """Draw both sides; yields each as soon as it is there."""
        images: list[Image.Image] = []
        try:
            drawing = checked(prompt, seed, steps, guidance, scale)
            base, chosen, size = sides(self.catalog, a, b)
            for label, adapter in chosen:

                def on_step(step: int, label: str = label) -> None:
                    if self.current.get(request.session_hash) != number:
                        raise Stopped
                    progress((step, drawing.steps), desc=label, unit="steps")

                on_step(0)
                yield gr.skip(), _cards(chosen, images), gr.skip()
                images.append(self.models.draw(base, adapter, replace(drawing, size=size), on_step))
            slider = parts.slider([label for label, _ in chosen], images)
            yield _message("Done."), _cards(chosen, images), slider
        except Stopped:
            yield _message("Cancelled."), gr.skip(), gr.skip()
        except (UserError, TrainingError) as error:
            text = escape(parts.plain(error, self.catalog))
            raise gr.Error(text, print_exception=False) from error

    def stop(self, request: gr.Request) -> None:
        """End what this browser asked for, before its next step."""
        self.current.pop(request.session_hash, None)


def _message(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'


def _cards(sides: Sequence[tuple[str, Any]], images: Sequence[Image.Image]) -> str:
    addresses = [parts.data_uri(image) for image in images] + [None] * len(sides)
    cards = [
        parts.card(label, address, role)
        for (label, _), address, role in zip(sides, addresses, "AB", strict=False)
    ]
    return f'<div class="cards">{"".join(cards)}</div>'
