"""What the Generate tab asks for, and the thread that draws it. No widgets here."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.pipeline import MINI

from .catalog import Catalog
from .models import MAX_SEED, MAX_STEPS, Base, Models, Request, Stopped
from .runs import RunItem

BASE = ""
"""Stands for the base model among the paths of runs."""


@dataclass
class Work:
    """A generation that is going on in a thread of its own.

    Args:
        sides: label and run folder of each image; None for the base model alone.
        base: the base model of all.
        request: what is drawn.
        place: the root's place on the machine, which no message shows.
        stop: ends the work before its next step.
        news: ("wait", number before), ("begun", position), ("step", (position, number)),
            ("image", image), and at last "end", "stopped" or "error" with a sentence.
    """

    sides: list[tuple[str, Path | None]]
    base: Base
    request: Request
    place: str
    stop: threading.Event = field(default_factory=threading.Event)
    news: queue.SimpleQueue[tuple[str, Any]] = field(default_factory=queue.SimpleQueue)

    def run(self, models: Models) -> None:
        """Wait for a turn and draw each side; report the course and how it ended."""
        try:
            with models.turn(self.stop, lambda ahead: self.news.put(("wait", ahead))):
                for position in range(len(self.sides)):
                    self.news.put(("image", self._draw(models, position)))
            self.news.put(("end", "Done."))
        except Stopped:
            self.news.put(("stopped", "Cancelled."))
        except UserError as error:
            self.news.put(("error", str(error).replace(self.place, "")))
        except Exception as error:
            # The page has to hear of it; the traceback goes to the terminal.
            self.news.put(("error", f"The images could not be made ({type(error).__name__})."))
            raise

    def _draw(self, models: Models, position: int) -> Image:
        self.news.put(("begun", position))
        return models.draw(
            self.base,
            self.sides[position][1],
            self.request,
            stop=self.stop,
            on_step=lambda step: self.news.put(("step", (position, step))),
        )


def sides(
    catalog: Catalog, a: str, b: str
) -> tuple[Base, list[tuple[str, Path | None]], int | None]:
    """What two choices mean: base model, label and folder of each, and the size trained on.

    Args:
        a, b: paths of runs, or ``BASE``.

    Raises:
        UserError: a run has gone, the two have different base models, or its files lead out of the
            root.
    """
    runs = {run.path: run for run in catalog.runs() if drawable(run)}
    chosen: list[RunItem | None] = []
    for path in (a, b):
        if path != BASE and path not in runs:
            raise UserError(f'the run "{path}" has gone: choose another')
        chosen.append(runs.get(path))
    bases = list(dict.fromkeys(Base.of(run.record["config"]) for run in chosen if run))
    if len(bases) > 1:
        raise UserError(
            f"the two runs have different base models, {bases[0].name} and {bases[1].name}:"
            " choose two of one"
        )
    if not bases:  # the base model of the first run, or the miniature
        bases = [Base.of(run.record["config"]) for run in runs.values()] or [Base(MINI)]
    found = []
    for run in chosen:
        if run is not None and run.weights is not None:
            catalog.resolve(run.weights)  # a link out of the root is refused
        folder = None if run is None else catalog.resolve(run.path)
        found.append(("base model" if run is None else run.name, folder))
    sizes = [run.record["config"].get("resolution") for run in chosen if run is not None]
    return bases[0], found, next((size for size in sizes if isinstance(size, int)), None)


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
