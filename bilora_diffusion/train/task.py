"""The contract between the loop and what is trained: `Task` and `MicroBatch`; and the endless,
reproducible streams of samples by position that tasks read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor, nn

from ..config.run import RunConfig
from ..core.seeds import generator
from ..core.values import HELDOUT_LOSS
from ..methods import Target
from ..run.data import SampleContent

MAX_PARTS = 128
"""So many parts of the held-out samples are logged at most, each as a column."""
Repeats = int | Sequence[int]
"""How often a sample appears in one pass over the data: all alike, or each."""


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


def part_prefix(measure: str) -> str:
    """What stands before the number of a part of the held-out samples in the name of its value."""
    return f"{measure}_of/"


def loss_by_part(
    losses: Sequence[float], total: float, measure: str = HELDOUT_LOSS
) -> dict[str, float]:
    """``heldout_loss_of/N`` of parts of the held-out samples, whose mean is the held-out loss.

    Args:
        losses: Sum of the losses of each sample.
        total: Number of losses in all of these sums together.
        measure: Name of the mean, such as ``heldout_distance``.
    """
    count = min(len(losses), MAX_PARTS)
    parts = {}
    for part in range(count):
        parts[f"{part_prefix(measure)}{part}"] = sum(losses[part::count]) * count / total
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


class SampleOrder:
    """A stream of sample numbers: one shuffled pass over the data after the other.

    Every epoch is a permutation drawn from (seed, epoch) in which each sample appears as often as
    its ``repeats`` say. A position is absolute, so a resumed run needs nothing but its step count.

    Args:
        n: samples in the data set.
        purpose: keeps two streams of the same run apart (instance and class images).
    """

    def __init__(self, n: int, seed: int, repeats: Repeats = 1, purpose: str = "order") -> None:
        self.seed, self.purpose = seed, purpose
        counts = torch.as_tensor(repeats).expand(n)  # (n,)
        # First all samples, then those that repeat once more, and so on.
        passes = [(counts > turn).nonzero()[:, 0] for turn in range(int(counts.max()))]
        self._samples = torch.cat(passes)
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        """Positions of one epoch: the sum of all samples' repeats."""
        return len(self._samples)

    def sample(self, position: int) -> int:
        """The sample, in [0, n), at the absolute ``position`` (0 is the first of epoch 0)."""
        epoch, offset = divmod(position, len(self))
        return int(self._samples[self.permutation(epoch)[offset]])

    def permutation(self, epoch: int) -> Tensor:
        """The shuffled positions of one epoch, (len(self),), in passes over all samples."""
        # One epoch is cached: positions are asked for in order.
        if epoch != self._epoch:
            random = generator(self.purpose, self.seed, epoch)
            self._epoch, self._permutation = epoch, self._shuffled(random)
        return self._permutation

    def _shuffled(self, random: torch.Generator) -> Tensor:
        return torch.randperm(len(self), generator=random)


class KindsOrder:
    """A stream like ``SampleOrder``'s in which all samples of a step are of one kind.

    Each kind has a shuffled stream of its own, which its steps go on with. In every pass over the
    data it gets as many steps as its share makes whole, so that in the long run all samples appear
    as often as they repeat, however few are of a kind; the steps of a pass are shuffled.

    Args:
        kinds: of each sample.
        step_size: samples of a step.
    """

    def __init__(
        self, kinds: Sequence[Hashable], seed: int, step_size: int, repeats: Repeats = 1
    ) -> None:
        self.seed, self.step_size = seed, step_size
        counts = torch.as_tensor(repeats).expand(len(kinds))
        self._members: dict[Hashable, list[int]] = {}
        for sample, kind in enumerate(kinds):
            self._members.setdefault(kind, []).append(sample)
        self._orders: dict[Hashable, SampleOrder] = {}
        for kind, members in self._members.items():
            member_counts = counts[members].tolist()
            # By the kind itself and not its place, so that a further kind changes no other's order.
            self._orders[kind] = SampleOrder(len(members), seed, member_counts, f"order of {kind}")
        self._passes = 0
        # Each step's kind, and how many steps of this kind come before it.
        self._steps: list[tuple[Hashable, int]] = []
        self._step_counts: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        """Samples of one pass."""
        return sum(map(len, self._orders.values()))

    def sample(self, position: int) -> int:
        """The sample at the absolute ``position`` (0 is the first of the first step)."""
        step, slot = divmod(position, self.step_size)
        while len(self._steps) <= step:
            self._add_pass()
        kind, number = self._steps[step]
        return self._members[kind][self._orders[kind].sample(number * self.step_size + slot)]

    def _add_pass(self) -> None:
        kinds: list[Hashable] = []
        for kind, order in self._orders.items():
            # The steps that a kind's share makes whole after n passes, floor((n size + phase) / s):
            # a random phase keeps the kinds from rounding up in the same pass.
            random = generator("phase", self.seed, str(kind))
            phase = int(torch.randint(self.step_size, (), generator=random))
            steps_before = (self._passes * len(order) + phase) // self.step_size
            steps_after = ((self._passes + 1) * len(order) + phase) // self.step_size
            kinds += [kind] * (steps_after - steps_before)
        random = generator("steps", self.seed, self._passes)
        for place in torch.randperm(len(kinds), generator=random).tolist():
            kind = kinds[place]
            self._steps.append((kind, self._step_counts[kind]))
            self._step_counts[kind] += 1
        self._passes += 1


class LengthGroupedOrder(SampleOrder):
    """A stream like ``SampleOrder``'s in which the samples of a batch are about equally long.

    Each epoch is what Transformers' ``group_by_length`` makes of a permutation drawn from (seed,
    epoch): groups of ``group`` batches, each sorted by length, longest first. The longest sample of
    all changes places with the first, so that memory runs out in the first step or never.

    Args:
        lengths: of each sample, in tokens.
        batch_size: samples of one batch.
        group: batches that are sorted together.
    """

    def __init__(self, lengths: Sequence[int], seed: int, batch_size: int, group: int = 50) -> None:
        super().__init__(len(lengths), seed)
        self.lengths, self.batch_size, self.group = list(lengths), batch_size, group

    def _shuffled(self, random: torch.Generator) -> Tensor:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        indices = get_length_grouped_indices(self.lengths, self.batch_size, self.group, random)
        return torch.tensor(indices)
