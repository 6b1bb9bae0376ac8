"""The contract between the loop and what is trained: `Task` and `MicroBatch`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import nn

from ..config.run import RunConfig
from ..methods import Target
from ..run.data import SampleContent

BY_SAMPLE = "heldout_loss_of/"
"""Stands before the number of a part of the held-out samples in the name of its loss."""
MAX_PARTS = 128
"""So many parts of the held-out samples are logged at most, each as a column."""


@dataclass(frozen=True)
class MicroBatch:
    """Frozen inputs of one forward and backward pass.

    Attributes:
        slots: Positions of its samples in the step's whole batch.
        names: Names of its samples, for error messages.
        digests: Hash of data and noise of each slot, by which two runs can be proven to have seen
            the same.
        inputs: Arguments of the task's module.
        levels: Noise levels that its images are seen at, in the units of the log.
        samples: Number of each row's sample in the training set, as the module sees the rows; None
            for a row that is no sample, such as a class image.
        snr: Signal-to-noise ratio of each row, where the model predicts noise.
    """

    slots: tuple[int, ...]
    names: tuple[str, ...]
    digests: tuple[str, ...]
    inputs: dict[str, Any] = field(repr=False)
    levels: tuple[float, ...] = ()
    samples: tuple[int | None, ...] = ()
    snr: tuple[float, ...] = ()

    def on(self, device: torch.device) -> dict[str, Any]:
        """The inputs on a device."""
        inputs, is_gpu = self.inputs, device.type == "cuda"
        if is_gpu:
            # Only a copy from pinned memory need not be waited for.
            inputs = recursively_apply(lambda t: t if t.is_cuda else t.pin_memory(), inputs)
        return cast(dict[str, Any], send_to_device(inputs, device, non_blocking=is_gpu))


Config = TypeVar("Config", bound=RunConfig)
Fold = tuple[Sequence[int], Sequence[int]]
"""Positions of the samples to learn from, and of those to hold out."""


class Task(Protocol[Config]):
    """What `loop.run` trains; its models, and what is encoded of its data, serve several runs."""

    cfg: Config

    @property
    def module(self) -> nn.Module:
        """Holds the trained models as children; ``module(inputs)`` gives one loss per slot."""
        ...

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        ...

    @property
    def sample_names(self) -> Sequence[str]:
        """Of the samples of the training set, in the order of their numbers."""
        ...

    def data_summary(self) -> str:
        """The training data in a few words, such as "23 images at 1024 px"."""
        ...

    def targets(self) -> list[Target]:
        """The models that get adapters, with their learning rates."""
        ...

    def micro_batches(
        self, schedule: Sequence[tuple[int, tuple[int, ...]]], step_size: int
    ) -> Iterator[MicroBatch]:
        """MicroBatch objects, one for each (step, slots) of ``schedule``, in order."""
        ...

    def heldout_loss(self, evaluating: AbstractContextManager[Any]) -> dict[str, float]:
        """``heldout_loss`` and whatever else comes with it, free of chance; {} without a set."""
        ...

    def validate(
        self, step: int, folder: Path, evaluating: AbstractContextManager[Any]
    ) -> dict[str, float]:
        """Write validation samples under ``validation/step-N``; returns what they measure, if
        anything.
        """
        ...

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models that are trained, by name."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Of all samples, by which they are dealt into folds."""
        ...

    @property
    def has_heldout(self) -> bool:
        """Test that a loss can be measured on samples that are not learned from."""
        ...

    def training_content(self) -> Sequence[SampleContent]:
        """Names and hashes of all that is learned from, in order."""
        ...

    def heldout_content(self) -> Sequence[SampleContent]:
        """Names and hashes of the held-out samples, in order; [] without a set."""
        ...

    def with_config(
        self, cfg: Config, fold: Fold | None = None, is_trial: bool = False
    ) -> Task[Config]:
        """A task of another configuration on the same models and what is encoded.

        Args:
            cfg: Configuration of the new task.
            fold: Part of the samples; None for all of them, with the held-out set.
            is_trial: True for a run of a search: it measures each held-out sample, and nothing
                else.
        """
        ...


def loss_by_part(losses: Sequence[float], total: float) -> dict[str, float]:
    """``heldout_loss_of/N`` of parts of the held-out samples, whose mean is the held-out loss.

    Args:
        losses: Sum of the losses of each sample.
        total: Number of losses in all of these sums together.
    """
    count = min(len(losses), MAX_PARTS)
    parts = {}
    for part in range(count):
        parts[f"{BY_SAMPLE}{part}"] = sum(losses[part::count]) * count / total
    return parts


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the training flag is restored."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def precision(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: of its first floating-point weight, since 4-bit weights
    are held as integers.
    """
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
