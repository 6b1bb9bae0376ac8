"""The Generate tab: one prompt, two adapters, the same noise."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr

from bilora_diffusion.errors import UserError
from bilora_diffusion.mini import MINI

from . import parts
from .catalog import Catalog
from .drawing import BASE, Pipelines, Work, checked, drawable, sides, usual
from .parts import QUIET
from .runs import ordered, pair

PROMPT = "a TOK icon of a rabbit, in the style of TOK"
IDLE_SECONDS = 0.2
VISITORS = 16
"""Those who may stand in line with their place shown; Gradio's own queue holds the others."""


class Tab:
    """The widgets, and what happens when they are used."""

    def __init__(self, catalog: Catalog, changed: Any, device: str | None) -> None:
        self.catalog, self.models = catalog, Pipelines(device)
        self.running: dict[str | None, Work] = {}
        self._widgets()
        self._events(changed)

    def _widgets(self) -> None:
        self.empty = parts.html("generate-empty", visible=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self.prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, elem_id="generate-prompt")
                with gr.Row():
                    self.a = gr.Dropdown(label="A", elem_id="generate-a", min_width=120)
                    self.b = gr.Dropdown(label="B", elem_id="generate-b", min_width=120)
                whole: dict[str, Any] = {"precision": 0, "min_width": 90}
                with gr.Row():
                    self.seed = gr.Number(0, label="Seed", elem_id="generate-seed", **whole)
                    self.steps = gr.Number(25, label="Steps", elem_id="generate-steps", **whole)
                self.guidance = gr.Slider(
                    0, 12, 4, step=0.5, label="Guidance scale", elem_id="generate-guidance"
                )
                self.base = gr.State(MINI)
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

    def _events(self, changed: Any) -> None:
        changed(self.choices, [self.a, self.b], [self.a, self.b, self.empty], **QUIET)
        # Where another base model is chosen; else what was set stays.
        gr.on(
            [self.a.change, self.b.change],
            self.usual,
            [self.a, self.b, self.base],
            [self.steps, self.guidance, self.base],
            **QUIET,
        )
        asked = [self.prompt, self.a, self.b, self.seed, self.steps, self.guidance, self.scale]
        shown = [self.status, self.cards, self.slider]
        # No `cancels` of Gradio's here: it leaves the next event in error now and then. The work
        # ends by itself when it is stopped, waiting in line or drawing.
        gr.on(
            [self.go.click, self.prompt.submit],
            self.generate,
            inputs=asked,
            outputs=shown,
            show_progress="minimal",
            show_progress_on=self.status,
            trigger_mode="multiple",
            concurrency_limit=VISITORS,
            api_visibility="private",
        )
        self.cancel.click(self.stop, inputs=[], outputs=[], queue=False, **QUIET)

    def choices(self, a: str | None, b: str | None) -> list[Any]:
        """Fill the two lists; what is chosen already stays, and first are LoRA and Bi-LoRA."""
        runs = ordered([run for run in self.catalog.now.runs if drawable(run)])
        named = [("base model", BASE), *((run.name, run.path) for run in runs)]
        first = [BASE, BASE, *(run.path for run in pair(runs))][-2:]
        there = {path for _, path in named}
        kept = a in there and b in there and {a, b} != {BASE}
        a, b = (a, b) if kept else first
        text = "" if runs else parts.empty(self.catalog, "No trained run yet", "demo")
        return [*(gr.update(choices=named, value=one) for one in (a, b)), parts.shown(text)]

    def usual(self, a: str, b: str, before: str) -> list[Any]:
        """Steps and guidance that are usual for the base model, if it is another than before."""
        try:
            base, _, _ = sides(self.catalog, a, b)
            if base.name != before:
                return [*usual(base), base.name]
        except UserError:  # Generate will say it
            pass
        return [gr.skip()] * 3

    def generate(
        self,
        prompt: str,
        a: str,
        b: str,
        seed: float | None,
        steps: float | None,
        guidance: float,
        scale: float,
        request: gr.Request,
    ) -> Iterator[Any]:
        """Draw both sides; yields the state of the work as it goes on."""
        try:
            drawing = checked(prompt, seed, steps, guidance, scale)
            base, chosen, size = sides(self.catalog, a, b)
        except UserError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error
        work = Work(chosen, base, replace(drawing, size=size), f"{self.catalog.root}/")
        self.stop(request)  # who presses Generate again wants the new one
        self.running[request.session_hash] = work
        thread = threading.Thread(target=work.run, args=(self.models,), daemon=True)
        thread.start()
        drawn = -1
        try:
            while thread.is_alive():
                # Yielding is what lets Gradio notice that a browser has gone.
                done, drawn = drawn, len(work.images)
                yield _progress(work), gr.skip() if drawn == done else _cards(work), gr.skip()
                thread.join(IDLE_SECONDS)
            if work.failed:
                yield "", gr.skip(), gr.skip()
                raise gr.Error(escape(work.message), print_exception=False)
            slider = parts.slider([label for label, _ in work.sides], work.images)
            yield _message(work.message), _cards(work), slider
        finally:  # also when the browser has gone
            work.stop.set()
            if self.running.get(request.session_hash) is work:
                del self.running[request.session_hash]

    def stop(self, request: gr.Request) -> None:
        """End what this browser asked for."""
        work = self.running.get(request.session_hash)
        if work is not None:
            work.stop.set()


def _message(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'


def _progress(work: Work) -> str:
    if work.ahead:
        return _message(f"Waiting: {work.ahead} before you.")
    steps, position = work.request.steps, len(work.images)
    what = f"step {work.step} of {steps}" if work.step else "getting ready"
    label = work.sides[min(position, len(work.sides) - 1)][0]
    done = f'value="{position * steps + work.step}" max="{len(work.sides) * steps}"'
    return f"{_message(f'{label}: {what}')}<progress {done}></progress>"


def _cards(work: Work) -> str:
    addresses = [parts.data_uri(image) for image in work.images] + [None] * len(work.sides)
    cards = [
        parts.card(label, address, role)
        for (label, _), address, role in zip(work.sides, addresses, "AB", strict=False)
    ]
    return f'<div class="cards">{"".join(cards)}</div>'
