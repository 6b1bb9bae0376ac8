"""What a dry run of images goes through beside the shared steps: prompts, autoencoder, drawing."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ..train.dry_run import hold_weights
from ..train.memory import Ledger
from ..train.stepping import Schedule
from ..train.task import MicroBatch, inference
from ..train.trainer import Trainer
from .heldout import GridLoss, grid_levels
from .sampling import generate
from .task import DreamBooth


class Rehearsal:
    """A task without weights that stands for one with as many and as long captions.

    All captions are its longest ones, of which no more are embedded than a step has, and of
    held-out images no more are looked at than the grid takes at a time.
    """

    def __init__(self, task: DreamBooth, schedule: Schedule, ledger: Ledger) -> None:
        self.task, self._held = task, task.validation
        longest = sorted(task.stream.captions(), key=len, reverse=True)[: schedule.step_size]
        replaced: Any = vars(task)
        task.validation = None  # its grid is made in a phase of its own
        condition, embed = task.condition, task.embed

        def conditioned(captions: Sequence[str]) -> dict[str, Any]:
            return condition([longest[i % len(longest)] for i in range(len(captions))])

        def embedded(device: torch.device) -> None:
            hold_weights(self.parts, ledger)
            stream: Any = task.stream
            replaced["stream"] = SimpleNamespace(captions=lambda: longest)
            with ledger.phase("embedding the prompts"):
                embed(device)
            task.stream = stream

        replaced |= {"condition": conditioned, "embed": embedded}
        hold_weights(self.parts, ledger)

    @property
    def parts(self) -> dict[str, Any]:
        """The pipeline's."""
        return self.task.pipeline.components

    def batches(self, trainer: Trainer, ledger: Ledger) -> list[MicroBatch]:
        """The first micro-batch of the first step; all images are of one size."""
        return next(trainer.micro_batches())[:1]

    def measured(self, trainer: Trainer, ledger: Ledger) -> None:
        """The held-out loss, and images of the first prompts."""
        if self._held is not None:
            with ledger.phase("held-out loss"), trainer.evaluating(), inference(self.task.module):
                self._heldout_loss()
        if self.task.cfg.sampled_prompts:
            with ledger.phase("validation images"), trainer.evaluating():
                self._draw()

    def _heldout_loss(self) -> None:
        task, held = self.task, self._held
        assert held is not None
        some = held.only(range(min(len(held), 8)))
        grid = GridLoss(task, SimpleNamespace(images=some.only([0])), some)
        images = next(iter(grid.batches(grid.sets["heldout_loss"])))
        grid.losses(images, grid_levels(task.module.denoising.num_timesteps)[0])

    def _draw(self) -> None:
        task, cfg = self.task, self.task.cfg
        prompts = cfg.sampled_prompts[: cfg.sample_batch_size]
        # What has no values can be no picture.
        task.pipeline.image_processor = SimpleNamespace(postprocess=lambda pixels, **_: [])
        with inference(task.module):
            generate(
                task.pipeline,
                prompts,
                list(range(len(prompts))),
                size=cfg.resolution,
                steps=2,
                embeddings=task.prompts.with_negative(prompts) if task.prompts else None,
                batch=cfg.sample_batch_size,
            )
