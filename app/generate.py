"""The tab Generate, which samples one prompt with two adapters, and the jobs of all browsers.

Both adapters start from the same noise. The viewer samples for one browser at a time. Each browser
sees the progress of its own job and can cancel it.
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
from bilora_diffusion.mini import MINI
from eval.clip_scores.settings import usual
from eval.sampler import has_sampler

from . import parts
from .catalog import Catalog
from .parts import QUIET
from .runs import (
    CONTROL,
    PROMPT,
    RunItem,
    find_control,
    sort_newest_first,
    sort_runs,
    suggest_prompt,
)
from .sampling import BASE, Sampler, can_sample, find_comparison, read_form

# Maximum number of runs without weights that are named; any others are only counted.
MAX_NAMES = 4


class Stopped(Exception):
    """Raised to end a job: it was cancelled or replaced, or the browser has left the page."""


class Work:
    """The sampler that all parts of the page share, and the current job of each browser.

    Args:
        catalog: folders of the viewer.
        page: the page; when a browser leaves it, the browser's job ends.
        device: name of a device, such as "cuda:1"; None for a CUDA GPU if there is one.
    """

    def __init__(self, catalog: Catalog, page: gr.Blocks, device: str | None) -> None:
        self.catalog = catalog
        self.sampler = Sampler(device)
        self._numbers = itertools.count(1)
        self._current: dict[str | None, int] = {}  # session of a browser -> number of its job
        page.unload(self.stop)

    def events(
        self,
        name: str,
        sample: Callable[..., Iterator[Any]],
        prompt: gr.Textbox,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
    ) -> None:
        """Add the buttons Generate and Cancel with their events, and the event of Shift+Enter.

        Args:
            name: beginning of the buttons' ids.
            sample: called with the job's number and the values of `inputs`.
            prompt: widget with several lines, in which Shift+Enter also starts a job.
            inputs: widgets of the form.
            outputs: HTML widgets for the values that `sample` yields. They are cleared first; the
                first one shows the progress.
        """

        def start(request: gr.Request) -> list[Any]:
            cleared = [""] * len(outputs)
            return [self.begin(request), *cleared]

        with gr.Row():
            go = gr.Button("Generate", variant="primary", elem_id=f"{name}-go")
            cancel = gr.Button("Cancel", elem_id=f"{name}-cancel")
        number = gr.Number(0, visible=False)
        # Gradio's `cancels` is not used, because the next event sometimes fails after it.
        pressed = [go.click, prompt.submit]
        started = gr.on(pressed, start, [], [number, *outputs], queue=False, **QUIET)
        started.then(
            sample,
            [number, *inputs],
            [*outputs],
            show_progress="minimal",
            show_progress_on=outputs[0],
            trigger_mode="multiple",
            concurrency_id="sampling",
            concurrency_limit=1,
            api_visibility="private",
        )
        cancel.click(self.stop, [], [], queue=False, **QUIET)

    def begin(self, request: gr.Request) -> int:
        """Return a number for a new job, and end this browser's earlier job."""
        number = next(self._numbers)
        self._current[request.session_hash] = number
        return number

    def stop(self, request: gr.Request) -> None:
        """End this browser's job before its next sampler step."""
        self._current.pop(request.session_hash, None)

    def check(self, number: int, request: gr.Request) -> None:
        """Raise `Stopped` unless this is the number of the browser's current job."""
        if self._current.get(request.session_hash) != number:
            raise Stopped

    @contextmanager
    def errors_on_page(self) -> Iterator[None]:
        """Show errors within the context on the page, as one sentence."""
        try:
            yield
        except (UserError, TrainingError) as error:
            text = escape(self.catalog.without_root(error))
            raise gr.Error(text, print_exception=False) from error


def message(text: str) -> str:
    """Return a line of text as HTML."""
    return f'<p class="quiet">{escape(text)}</p>'


def placeholder(text: str) -> str:
    """Return a sentence that is shown until there are images, as HTML."""
    return f'<p class="quiet placeholder">{escape(text)}</p>'


class Tab:
    """The tab Generate: its widgets and their events.

    Args:
        work: the sampler and the browsers' jobs.
        changed: event after which the list of runs is filled.
    """

    def __init__(self, work: Work, changed: Any) -> None:
        self.work = work
        self.catalog = work.catalog
        self.empty = parts.html("generate-empty", visible=False)
        with gr.Row(equal_height=False):
            # Left: the form
            with gr.Column(scale=2, min_width=300) as form:
                prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, elem_id="generate-prompt")
                self.a = gr.Dropdown(label="A", elem_id="generate-a")
                self.b = gr.Dropdown(label="B", elem_id="generate-b")
                self.absent = parts.html("generate-absent", visible=False)
                number_options: dict[str, Any] = {"precision": 0, "min_width": 90}
                with gr.Row():
                    seed = gr.Number(0, label="Seed", elem_id="generate-seed", **number_options)
                    steps = gr.Number(25, label="Steps", elem_id="generate-steps", **number_options)
                guidance = gr.Slider(
                    0, 12, 4, step=0.5, label="Guidance scale", elem_id="generate-guidance"
                )
                source = gr.Slider(
                    0,
                    1,
                    1,
                    step=0.05,
                    label="Guidance from",
                    info="Strength of the adapter in the unconditional prediction. Other programs"
                    " use 1; with 0, the base model makes this prediction.",
                    elem_id="generate-guidance-from",
                )
                base = gr.State(MINI)  # basis of the suggested steps and guidance
                scale = gr.Slider(
                    0, 2, 1, step=0.05, label="Adapter scale", elem_id="generate-scale"
                )
                run_sampler = gr.Checkbox(
                    True,
                    label="Sampler of the runs",
                    info="Use the LoRA file and the scheduler of the runs' validation images.",
                    visible=False,
                    elem_id="generate-run-sampler",
                )
            # Right: the images
            with gr.Column(scale=5, min_width=300):
                outputs = [parts.html(f"generate-{name}") for name in ("status", "cards", "slider")]
                outputs[0].value = placeholder("Press Generate: the images of A and B appear here.")
        widgets = [self.a, self.b, self.absent, self.empty]
        changed(self.fill, [self.a, self.b], widgets, **QUIET)
        choice_events = [self.a.change, self.b.change, run_sampler.input]
        inputs = [self.a, self.b, base, prompt, run_sampler]
        suggested = [prompt, steps, guidance, base, run_sampler]
        gr.on(choice_events, self.suggest, inputs, suggested, **QUIET)
        inputs = [prompt, self.a, self.b, seed, steps, guidance, source, scale, run_sampler]
        with form:
            work.events("generate", self.generate, prompt, inputs, outputs)

    def fill(self, a: str | None, b: str | None) -> list[Any]:
        """Fill the two lists, and keep a valid choice; otherwise, use `first_choice`."""
        runs = sort_runs([run for run in self.catalog.scan.runs if can_sample(run)])
        choices = [("base model", BASE)]
        for run in runs:
            choices.append((run.name, run.path))
        paths = {path for _, path in choices}
        has_choice = a in paths and b in paths and {a, b} != {BASE}
        if not has_choice:
            a, b = first_choice(runs)
        text = ""
        if not runs:
            text = parts.empty_notice(self.catalog, "No trained run yet", "demo")
        lists = [gr.update(choices=choices, value=value) for value in (a, b)]
        return [*lists, parts.notice(runs_without_weights(self.catalog)), parts.notice(text)]

    def suggest(
        self, a: str, b: str, last_base: str, prompt: str, uses_run_sampler: bool
    ) -> list[Any]:
        """Suggest a prompt, steps and a guidance scale for the chosen pair.

        The prompt comes from the first chosen run, unless the user has written one. Steps and
        guidance are the usual ones of the base model, without guidance if all chosen runs were
        trained towards it (``--guided_target``). If all chosen runs have the same sampler (LoRA
        file or scheduler) and the checkbox is on, they come from the runs. They are suggested again
        only if this basis has changed.

        The checkbox is shown if a chosen run has a sampler.
        """
        runs = {run.path: run for run in self.catalog.scan.runs if can_sample(run)}
        chosen_runs = [runs[path] for path in (a, b) if path in runs]
        if chosen_runs:
            prompt = suggest_prompt(prompt, chosen_runs[0], list(runs.values()))
        has_samplers = [has_sampler(run.record["config"]) for run in chosen_runs]
        checkbox = gr.update(visible=any(has_samplers))
        with suppress(UserError):  # the button Generate shows the error
            comparison = find_comparison(self.catalog, a, b, uses_run_sampler)
            base, sampler = comparison.base, comparison.sampler
            targets = [run.guided_target for run in chosen_runs]
            has_guidance = bool(targets) and min(targets) > 1
            # Basis of the suggested steps and guidance
            suggested_for = f"{base.name}, guided" if has_guidance else base.name
            if sampler.text:
                suggested_for += f", {sampler.text}"
            if suggested_for != last_base:
                model = base.read_base_model()
                steps, guidance = usual(model)
                if has_guidance:
                    guidance = model.family.unguided_scale
                steps, guidance = sampler.usual(steps, guidance)
                return [prompt, steps, guidance, suggested_for, checkbox]
        return [prompt, gr.skip(), gr.skip(), gr.skip(), checkbox]

    def generate(
        self,
        number: int,
        prompt: str,
        a: str,
        b: str,
        seed: float | None,
        steps: float | None,
        guidance: float,
        source: float,
        scale: float,
        uses_run_sampler: bool,
        request: gr.Request,
        progress: Callable[..., Any] = gr.Progress(),  # noqa: B008, how Gradio gives it
    ) -> Iterator[Any]:
        """Sample both sides, and show each image as soon as it is sampled.

        Yields:
            HTML of the outputs: status, cards, slider.
        """
        images: list[Image.Image] = []
        try:
            with self.work.errors_on_page():
                image_request = read_form(prompt, seed, steps, guidance, scale, source)
                comparison = find_comparison(self.catalog, a, b, uses_run_sampler)
                image_request = replace(
                    image_request, size=comparison.size, sampler=comparison.sampler
                )
                labels = [label for label, _ in comparison.sides]
                for label, adapter in comparison.sides:

                    def on_step(step: int, label: str = label) -> None:
                        self.work.check(number, request)
                        progress((step, image_request.steps), desc=label, unit="steps")

                    on_step(0)
                    yield gr.skip(), cards_html(labels, images), gr.skip()
                    images += self.work.sampler.sample(
                        comparison.base, adapter, [image_request], on_step
                    )
            slider = parts.slider_html(labels, images)
            text = "Done."
            if comparison.sampler.text:
                text = f"Done, with the validation images' sampler: {comparison.sampler.text}."
            yield message(text), cards_html(labels, images), slider
        except Stopped:
            yield message("Cancelled."), gr.skip(), gr.skip()


def first_choice(runs: Sequence[RunItem]) -> tuple[str, str]:
    """Return the paths of the first pair: the newest run that has a LoRA control, and this control.

    If no run has a control, they are the newest run and the base model. Without runs, both are the
    base model.
    """
    newest_runs = sort_newest_first(runs)
    for run in newest_runs:
        control = find_control(run, newest_runs)
        if control is not None and run.method != CONTROL:
            return run.path, control.path
    return (newest_runs[0].path if newest_runs else BASE), BASE


def runs_without_weights(catalog: Catalog) -> str:
    """Return a note on the image runs without weights, as HTML; "" if there are none."""
    names = []
    for run in catalog.scan.runs:
        if run.weights is None and not run.is_text:
            names.append(f"{run.name}, {run.status}")
    if not names:
        return ""
    listing = "; ".join(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        listing += f"; and {len(names) - MAX_NAMES} more"
    return message(f"Not listed, because they have no exported file yet: {listing}.")


def cards_html(labels: Sequence[str], images: Sequence[Image.Image]) -> str:
    """Return the cards of both sides as HTML; a side without an image is empty."""
    cards = ""
    for number, label in enumerate(labels):
        uri = None
        if number < len(images):
            uri = parts.data_uri(images[number])
        cards += parts.card_html(label, uri, role="AB"[number])
    return f'<div class="cards">{cards}</div>'
