"""What the Generate tab asks for, the thread that draws it, and the pipeline. No widgets here.

One pipeline is in memory at a time, and whoever draws with it has waited in line.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL.Image import Image

from bilora_diffusion.errors import TrainingError, UserError
from bilora_diffusion.image.base_model import describe
from bilora_diffusion.image.families import of
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.sampling import generate
from bilora_diffusion.mini import MINI, PIPELINES
from bilora_diffusion.run.console import quiet
from eval.clip_scores import settings
from eval.command import open_device
from eval.load import applied
from eval.sources import find

from .catalog import Catalog
from .runs import RunItem

BASE = ""
"""Stands for the base model among the paths of runs."""
MAX_STEPS, MAX_SEED = 200, 2**32 - 1


class Stopped(Exception):
    """Generation was stopped by whoever asked for it."""


@dataclass(frozen=True)
class BaseChoice:
    """A base model as a run's config names it."""

    name: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    vae: str | None = None

    @classmethod
    def of(cls, config: dict[str, Any]) -> BaseChoice:
        """The base model of a run."""
        names = ("revision", "variant", "cache_dir", "pretrained_vae_model_name_or_path")
        base = config.get("pretrained_model_name_or_path") or MINI
        return cls(base, *(config.get(name) for name in names))


@dataclass(frozen=True)
class Request:
    """What is to be drawn: as in diffusers, the adapter's scale, and the side in pixels, None for
    the model's own.
    """

    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    scale: float
    size: int | None = None


class Pipelines:
    """Keeps one pipeline loaded; ``line`` has who waits for it, first who has it.

    Args:
        device: such as "cuda:1"; None for a GPU where there is one.

    Raises:
        UserError: there is no such device.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device = open_device(device)
        self.line: list[Work] = []
        self._base: BaseChoice | None = None
        self._pipeline: Any = None

    def draw(
        self,
        base: BaseChoice,
        adapter: Path | None,
        request: Request,
        *,
        stop: threading.Event,
        on_step: Callable[[int], None],
    ) -> Image:
        """One image; to be called by the first in line.

        Args:
            base: loaded when it is not.
            adapter: run folder; None for the base model alone.
            stop: when set, work ends before the next step.
            on_step: called with the number of each step, from 1, when it was taken.

        Raises:
            Stopped: ``stop`` was set.
            UserError: the base model is not on this machine, or the adapter does not fit it.
        """
        pipeline = self._load(base)
        subject = find("base" if adapter is None else str(adapter))

        def watched(step: int) -> None:
            if stop.is_set():
                raise Stopped
            on_step(step)

        with applied(pipeline, subject, request.scale):
            return generate(
                pipeline,
                [request.prompt],
                [request.seed],
                size=request.size or of(pipeline).pixels(pipeline),
                steps=request.steps,
                guidance_scale=request.guidance_scale,
                on_step=watched,
            )[0]

    def _load(self, base: BaseChoice) -> Any:
        if self._base != base:
            self._base = self._pipeline = None  # frees the memory before the next one takes it
            quiet()
            folder = local(base)
            dtype = describe(folder).family.precision(self.device)
            pipeline = load_pipeline(
                folder,
                dtype=torch.float32 if base.name in PIPELINES else dtype,
                variant=base.variant,
                vae=local(BaseChoice(base.vae, cache_dir=base.cache_dir)) if base.vae else None,
            )
            self._pipeline, self._base = pipeline.to(self.device), base
        return self._pipeline


@cache
def usual(base: BaseChoice) -> tuple[int, float]:
    """Steps and guidance with which a base model's images are drawn by default.

    Raises:
        UserError: it is not on this machine.
    """
    _, steps, guidance = settings.usual(local(base), base.name)
    return steps, guidance


def local(base: BaseChoice) -> str:
    """The folder of a base model: the viewer itself downloads nothing.

    Raises:
        UserError: it is not on this machine.
    """
    if base.name in PIPELINES or Path(base.name).exists():
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


@dataclass(eq=False)
class Work:
    """A generation that is going on in a thread of its own.

    Args:
        sides: label and run folder of each image; None for the base model alone.
        base: the base model of all.
        request: what is drawn.
        place: the root's place on the machine, which no message shows.
        stop: ends the work before its next step.
        ahead: how many wait before it.
        step: that was taken last, of the image after ``images``.
        message: how it ended.
        failed: whether by an error.
    """

    sides: list[tuple[str, Path | None]]
    base: BaseChoice
    request: Request
    place: str
    stop: threading.Event = field(default_factory=threading.Event)
    ahead: int = 0
    step: int = 0
    images: list[Image] = field(default_factory=list)
    message: str = ""
    failed: bool = False

    def run(self, models: Pipelines) -> None:
        """Wait in line and draw each side."""
        models.line.append(self)
        try:
            while ahead := models.line.index(self):
                self.ahead = ahead
                if self.stop.wait(0.1):
                    raise Stopped
            self.ahead = 0
            for _, adapter in self.sides:
                about = (self.base, adapter, self.request)
                image = models.draw(*about, stop=self.stop, on_step=self._on_step)
                self.step = 0
                self.images.append(image)
            self.message = "Done."
        except Stopped:
            self.message = "Cancelled."
        except (UserError, TrainingError) as error:
            self.message, self.failed = str(error).replace(self.place, ""), True
        except Exception as error:
            # The page has to hear of it; the traceback goes to the terminal.
            self.message = f"The images could not be made ({type(error).__name__})."
            self.failed = True
            raise
        finally:
            models.line.remove(self)

    def _on_step(self, step: int) -> None:
        self.step = step


def sides(
    catalog: Catalog, a: str, b: str
) -> tuple[BaseChoice, list[tuple[str, Path | None]], int | None]:
    """What two choices mean: base model, label and folder of each, and the size trained on.

    Args:
        a, b: paths of runs, or ``BASE``.

    Raises:
        UserError: a run has gone, the two have different base models, or its files lead out of the
            root.
    """
    runs = {run.path: run for run in catalog.now.runs if drawable(run)}
    found: list[tuple[str, Path | None]] = []
    bases, size = list[BaseChoice](), None
    for path in (a, b):
        if path == BASE:
            found.append(("base model", None))
            continue
        if path not in runs:
            raise UserError(f'the run "{path}" has gone: choose another')
        run = runs[path]
        catalog.resolve(run.weights or path)  # a link out of the root is refused
        found.append((run.name, catalog.resolve(path)))
        bases.append(BaseChoice.of(run.record["config"]))
        size = size or run.record["config"].get("resolution")
    if len(set(bases)) > 1:
        raise UserError(
            f"the two runs have different base models, {bases[0].name} and {bases[1].name}:"
            " choose two of one"
        )
    # Of the base model alone: that of the first run, or the miniature.
    bases += [BaseChoice.of(run.record["config"]) for run in runs.values()]
    return (bases or [BaseChoice(MINI)])[0], found, size if isinstance(size, int) else None


def drawable(run: RunItem) -> bool:
    """Whether a run has weights for an SDXL pipeline."""
    return run.weights is not None and not run.weights.endswith("adapter_model.safetensors")


def checked(
    prompt: str, seed: float | None, steps: float | None, guidance: float, scale: float
) -> Request:
    """The form's values.

    Raises:
        UserError: one is missing or out of range.
    """
    if not prompt or not prompt.strip():
        raise UserError("the prompt is empty: write what is to be drawn")
    if seed is None or not 0 <= seed <= MAX_SEED:
        raise UserError(f"the seed is {seed}: give a whole number from 0 to {MAX_SEED}")
    if steps is None or not 1 <= steps <= MAX_STEPS:
        raise UserError(f"the number of steps is {steps}: give one from 1 to {MAX_STEPS}")
    return Request(prompt.strip(), int(seed), int(steps), float(guidance), float(scale))
