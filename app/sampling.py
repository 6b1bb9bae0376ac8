"""Sampling of images: requests, the pipeline that samples them, of which one is in memory at a
time, and the work that a browser asks for: one piece at a time, shown as it goes on, and ended by
whoever asked for it.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL.Image import Image

from bilora_diffusion.adapters import PRIMARY
from bilora_diffusion.core.errors import TrainingError, UserError, reason, strip_controls
from bilora_diffusion.core.files import is_file
from bilora_diffusion.core.values import (
    ADAPTER_GUIDANCE,
    BASE_GUIDANCE,
    GUIDANCE_SOURCES,
    GUIDANCES,
    SAMPLER_STEPS,
    STRENGTHS,
    check_choice,
)
from bilora_diffusion.export.conversion import export_checkpoint
from bilora_diffusion.image.base_model import describe
from bilora_diffusion.image.families import family_of
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.mini import MINI, PIPELINES
from bilora_diffusion.run.checkpoint import CHECKPOINTS, DIGESTS, FILES
from bilora_diffusion.run.console import quiet
from eval.clip_scores import settings
from eval.command import open_device
from eval.load import applied, require_adapter
from eval.sources import find

from .catalog import Catalog
from .parts import QUIET
from .runs import RunItem

BASE = ""  # stands for the base model among the paths of runs
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class BaseChoice:
    """A base model as a run's config names it."""

    name: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    vae: str | None = None

    @classmethod
    def of_config(cls, config: dict[str, Any]) -> BaseChoice:
        """The base model of a run."""
        names = ("revision", "variant", "cache_dir", "pretrained_vae_model_name_or_path")
        base = config.get("pretrained_model_name_or_path") or MINI
        return cls(base, *(config.get(name) for name in names))


@dataclass(frozen=True)
class Request:
    """A picture to draw, by diffusers' values; the side is in pixels, None for the model's own."""

    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    scale: float
    size: int | None = None
    guidance_from: str = ADAPTER_GUIDANCE


class Pipelines:
    """Keeps one pipeline loaded, on a device such as "cuda:1", or by default the best."""

    def __init__(self, device: str | None = None) -> None:
        self.device = open_device(device)
        self._base: BaseChoice | None = None
        self._pipeline: Any = None

    def draw(
        self,
        base: BaseChoice,
        adapter: Path | None,
        requests: Sequence[Request],
        on_step: Callable[[int], None],
    ) -> list[Image]:
        """One image for each request; not to be called by two at once.

        Args:
            base: loaded when it is not.
            adapter: run folder or LoRA file; None for the base model alone.
            requests: one, or several that differ in their scales and kinds of guidance.
            on_step: called with the number of each step of all images, from 1, when it was taken;
                what it raises ends the work.
        """
        pipeline, images = self._load(base), list[Image]()
        subject = find("base" if adapter is None else str(adapter))
        if any(request.guidance_from == BASE_GUIDANCE for request in requests):
            require_adapter(subject)
        with applied(pipeline, subject, requests[0].scale):
            for number, request in enumerate(requests):
                if number:
                    pipeline.set_adapters([PRIMARY], [request.scale])
                images += generate(
                    pipeline,
                    [request.prompt],
                    [request.seed],
                    size=request.size or family_of(pipeline).pixels(pipeline),
                    steps=request.steps,
                    guidance_scale=request.guidance_scale,
                    guidance_from=request.guidance_from,
                    on_step=lambda step, before=number * request.steps: on_step(before + step),
                )
        return images

    def _load(self, base: BaseChoice) -> Any:
        if self._base != base:
            self._base = self._pipeline = None  # frees the memory before the next one takes it
            quiet()
            try:
                pipeline = self._read(base)
            except (UserError, OSError) as error:
                # The reason tells whether a folder outside of the root exists and what is in it.
                # It is for who started the viewer, not for its visitors.
                print(strip_controls(f"{base.name}: {reason(error)}"), file=sys.stderr, flush=True)
                raise UserError(
                    f"the base model {base.name} can't be loaded (the terminal has the reason):"
                    f" download it with hf download {base.name}, or put its folder there"
                ) from error
            self._pipeline, self._base = pipeline.to(self.device), base
        return self._pipeline

    def _read(self, base: BaseChoice) -> Any:
        folder = local(base)
        dtype = describe(folder).family.precision(self.device)
        return load_pipeline(
            folder,
            dtype=torch.float32 if base.name in PIPELINES else dtype,
            variant=base.variant,
            vae=local(BaseChoice(base.vae, cache_dir=base.cache_dir)) if base.vae else None,
        )


@cache
def usual(base: BaseChoice) -> tuple[int, float]:
    """Steps and guidance with which a base model's images are drawn by default."""
    _, steps, guidance = settings.usual(local(base), base.name)
    return steps, guidance


@cache
def is_guided(base: BaseChoice) -> bool:
    """Test that its images have an unconditional prediction by default."""
    return settings.is_guided(local(base), base.name)


def local(base: BaseChoice) -> str:
    """The folder of a base model: the viewer itself downloads nothing."""
    # Path.exists would raise where the folder above may not be entered.
    if base.name in PIPELINES or os.path.exists(base.name):
        return base.name
    try:
        return snapshot_download(
            base.name, revision=base.revision, cache_dir=base.cache_dir, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        raise UserError(
            f'the base model "{base.name}" is not on this machine: download it with'
            f" hf download {base.name}, or put its folder there"
        ) from error


def sides(
    catalog: Catalog, a: str, b: str
) -> tuple[BaseChoice, list[tuple[str, Path | None]], int | None]:
    """Two choices as base model, label and folder of each, and the size trained on.

    Args:
        a, b: paths of runs, or ``BASE``.
    """
    runs = {run.path: run for run in catalog.scan.runs if drawable(run)}
    if missing := [path for path in (a, b) if path not in (BASE, *runs)]:
        raise UserError(f'the run "{missing[0]}" has gone: choose another')
    chosen_runs = [runs[path] for path in (a, b) if path != BASE]
    bases = [BaseChoice.of_config(run.record["config"]) for run in chosen_runs]
    if len(set(bases)) > 1:
        raise UserError(
            f"the two runs have different base models, {bases[0].name} and {bases[1].name}:"
            " choose two of one"
        )
    sides: dict[str, tuple[str, Path | None]] = {BASE: ("base model", None)}
    for run in chosen_runs:
        catalog.resolve(run.weights or run.path)  # a link out of the root is refused
        sides[run.path] = (run.name, catalog.resolve(run.path))
    # Of the base model alone: that of the first run, or the miniature.
    bases += [BaseChoice.of_config(run.record["config"]) for run in runs.values()]
    size = next((size for run in chosen_runs if (size := size_of(run))), None)
    return (bases or [BaseChoice(MINI)])[0], [sides[a], sides[b]], size


def size_of(run: RunItem) -> int | None:
    """The side of the images that a run was trained on, where its record has it."""
    size = run.record["config"].get("resolution")
    return size if isinstance(size, int) else None


def drawable(run: RunItem) -> bool:
    """Test that a run has weights of an image model."""
    return run.weights is not None and not run.weights.endswith("adapter_model.safetensors")


@contextmanager
def exported(catalog: Catalog, run: RunItem, step: int) -> Iterator[Path]:
    """The adapter of a run's checkpoint as a file, which lasts as long as the context."""
    for name in (DIGESTS, *FILES):  # a link out of the root is refused, and a pipe
        if not is_file(catalog.resolve(f"{run.path}/{CHECKPOINTS}/step-{step}/{name}")):
            raise UserError(f"the checkpoint of step {step} has no {name}: choose another")
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as place:
        (file,) = export_checkpoint(catalog.resolve(run.path), step, "diffusers", place)
        yield file


def checked(
    prompt: str,
    seed: float | None,
    steps: float | None,
    guidance: float,
    scale: float,
    guidance_from: str = ADAPTER_GUIDANCE,
) -> Request:
    """The form's values."""
    if not prompt or not prompt.strip():
        raise UserError("the prompt is empty: write what is to be drawn")
    if seed is None or not 0 <= seed <= MAX_SEED:
        raise UserError(f"the seed is {seed}: give a whole number from 0 to {MAX_SEED}")
    SAMPLER_STEPS.check("the number of steps", steps)
    GUIDANCES.check("the guidance scale", guidance)
    STRENGTHS.check("the adapter's scale", scale)
    check_choice("guidance from", guidance_from, GUIDANCE_SOURCES)
    values = prompt.strip(), int(seed), int(steps or 0), float(guidance), float(scale)
    return Request(*values, guidance_from=guidance_from)


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
