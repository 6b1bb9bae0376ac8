"""The contract between the loop and what it trains: `Task` and `MicroBatch`; and sample orders.

A sample order is an endless, reproducible stream of sample numbers by position.
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

from ..adapters import is_adapter_weight
from ..config.run import RunConfig
from ..core.errors import TrainingError
from ..core.seeds import generator
from ..methods import Target
from ..run.data import SampleContent

# Number of times that a sample appears in one pass over the data: one number, or one per sample.
Repeats = int | Sequence[int]


@dataclass(frozen=True)
class MicroBatch:
    """Frozen inputs of one forward and backward pass.

    Attributes:
        slots: positions of its samples in the batch of the whole step.
        names: names of its samples, for error messages.
        digests: hash of data and noise of each slot. Equal hashes prove that two runs have seen the
            same.
        inputs: arguments of the task's module.
        levels: noise levels of its images, in the units of the log.
    """

    slots: tuple[int, ...]
    names: tuple[str, ...]
    digests: tuple[str, ...]
    inputs: dict[str, Any] = field(repr=False)
    levels: tuple[float, ...] = ()

    def on(self, device: torch.device) -> dict[str, Any]:
        """The inputs on a device."""
        inputs = self.inputs
        is_gpu = device.type == "cuda"
        if is_gpu:
            # Only a copy from pinned memory can go on in the background.
            inputs = recursively_apply(lambda t: t if t.is_cuda else t.pin_memory(), inputs)
        return cast(dict[str, Any], send_to_device(inputs, device, non_blocking=is_gpu))


Config = TypeVar("Config", bound=RunConfig)


class Task(Protocol[Config]):
    """Data and models that `loop.run` trains; the same task can serve several runs.

    Attributes:
        cfg: configuration of the run.
        models: the models that are trained, by name.
        num_samples: samples of one epoch.
        has_heldout: True if there are held-out samples, on which a loss can be measured.
    """

    cfg: Config
    models: dict[str, nn.Module]
    num_samples: int
    has_heldout: bool

    # What follows are properties, since the types of a task's own attributes are narrower.

    @property
    def module(self) -> nn.Module:
        """Module with the trained models as children; ``module(inputs)`` gives a loss per slot."""
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
        """A micro-batch for each (step, slots) of a schedule, in order."""
        ...

    def heldout_loss(self, evaluating: AbstractContextManager[Any]) -> dict[str, float]:
        """Figure "heldout_loss" and others, without random numbers; {} without held-out data."""
        ...

    def validate(
        self, step: int, folder: Path, evaluating: AbstractContextManager[Any]
    ) -> dict[str, float]:
        """Write validation samples into ``validation/step-N``; returns their metrics, if any."""
        ...

    def training_content(self) -> Sequence[SampleContent]:
        """Names and hashes of the training samples, in order."""
        ...

    def heldout_content(self) -> Sequence[SampleContent]:
        """Names and hashes of the held-out samples, in order; [] without a set."""
        ...

    def with_config(self, cfg: Config) -> Task[Config]:
        """A task of another configuration, with the same models and encoded data."""
        ...


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Context manager: puts a module into evaluation mode, without gradients."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


@contextmanager
def explain_memory_errors(action: str, fix: str) -> Iterator[None]:
    """Context manager: turns the error of a full device memory into one sentence.

    Args:
        action: what was done, such as "sampling 4 images".
        fix: what the user can do, without a period.

    Raises:
        TrainingError: the memory is full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # The frames of a traceback hold the tensors that have filled the memory.
        error.with_traceback(None)
        raise TrainingError(f"{action} needs more memory than is left: {fix}.") from error


def precision(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: that of its first floating-point weight.

    4-bit weights are stored as integers, and adapters may have another dtype than the model.
    """
    dtypes = (
        weight.dtype
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and not is_adapter_weight(name)
    )
    return next(dtypes)


class SampleOrder:
    """A stream of sample numbers: shuffled passes over the data, one after the other.

    Every epoch is a permutation by (seed, epoch) in which each sample appears as often as it
    repeats. Positions are absolute, so that a resumed run needs nothing but its step.

    Args:
        n: number of samples.
        seed: seed of the run.
        repeats: number of times that a sample appears in an epoch.
        purpose: makes another stream of the same seed, such as that of class images.
    """

    def __init__(self, n: int, seed: int, repeats: Repeats = 1, purpose: str = "order") -> None:
        self.seed = seed
        self.purpose = purpose
        counts = torch.as_tensor(repeats).expand(n)  # (n,)
        # First all samples, then those that repeat once more, and so on.
        passes = [(counts > turn).nonzero()[:, 0] for turn in range(int(counts.max()))]
        self._samples = torch.cat(passes)
        # One epoch is cached, since positions are read in order.
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        """Positions of one epoch: the sum of all samples' repeats."""
        return len(self._samples)

    def sample(self, position: int) -> int:
        """The sample, in [0, n), at an absolute position; 0 is the first of epoch 0."""
        epoch, offset = divmod(position, len(self))
        return int(self._samples[self.permutation(epoch)[offset]])

    def permutation(self, epoch: int) -> Tensor:
        """The shuffled positions of one epoch, (len(self),), in passes over all samples."""
        if epoch != self._epoch:
            self._permutation = self._shuffle(generator(self.purpose, self.seed, epoch))
            self._epoch = epoch
        return self._permutation

    def _shuffle(self, random: torch.Generator) -> Tensor:
        """A permutation of the positions of an epoch."""
        return torch.randperm(len(self), generator=random)


class KindsOrder:
    """A stream like that of `SampleOrder` in which all samples of a step have one kind.

    Each kind has a shuffled stream, which its steps continue. In every pass over the data it gets
    as many steps as its samples fill, so that in the long run all samples appear as often as they
    repeat, however few have a kind. The steps of a pass are shuffled.

    Args:
        kinds: kind of each sample.
        seed: seed of the run.
        step_size: samples of a step.
        repeats: number of times that a sample appears in a pass.
    """

    def __init__(
        self, kinds: Sequence[Hashable], seed: int, step_size: int, repeats: Repeats = 1
    ) -> None:
        self.seed = seed
        self.step_size = step_size
        counts = torch.as_tensor(repeats).expand(len(kinds))  # (samples,)
        self._members: dict[Hashable, list[int]] = {}
        for sample, kind in enumerate(kinds):
            self._members.setdefault(kind, []).append(sample)
        self._orders: dict[Hashable, SampleOrder] = {}
        for kind, members in self._members.items():
            member_counts = counts[members].tolist()
            # By the kind itself, not by its number, so that a further kind changes no other order.
            self._orders[kind] = SampleOrder(len(members), seed, member_counts, f"order of {kind}")
        self._passes = 0
        # Each step's kind, and how many steps of this kind come before it.
        self._steps: list[tuple[Hashable, int]] = []
        self._step_counts: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        """Samples of one pass."""
        return sum(len(order) for order in self._orders.values())

    def sample(self, position: int) -> int:
        """The sample at an absolute position; 0 is the first of the first step."""
        step, slot = divmod(position, self.step_size)
        while len(self._steps) <= step:
            self._add_pass()
        kind, number = self._steps[step]
        member = self._orders[kind].sample(number * self.step_size + slot)
        return self._members[kind][member]

    def _add_pass(self) -> None:
        """Add the steps of one more pass over the data."""
        kinds: list[Hashable] = []  # of each new step
        for kind, order in self._orders.items():
            # After n passes a kind has had floor((n * size + phase) / step_size) steps. With a
            # random phase the kinds do not all round up in the same pass.
            random = generator("phase", self.seed, str(kind))
            phase = int(torch.randint(self.step_size, (), generator=random))
            steps_before = (self._passes * len(order) + phase) // self.step_size
            steps_after = ((self._passes + 1) * len(order) + phase) // self.step_size
            kinds += [kind] * (steps_after - steps_before)
        random = generator("steps", self.seed, self._passes)
        for number in torch.randperm(len(kinds), generator=random).tolist():
            kind = kinds[number]
            self._steps.append((kind, self._step_counts[kind]))
            self._step_counts[kind] += 1
        self._passes += 1


class LengthGroupedOrder(SampleOrder):
    """A stream like that of `SampleOrder` in which the samples of a batch have similar lengths.

    Each epoch is sorted as by Transformers' ``group_by_length``: a permutation by (seed, epoch) is
    cut into groups of batches, and each group is sorted by length, the longest first. The longest
    sample of all is swapped with the first one, so that memory runs out in the first step or never.

    Args:
        lengths: tokens of each sample.
        seed: seed of the run.
        batch_size: samples of a batch.
        group: batches of a group.
    """

    def __init__(self, lengths: Sequence[int], seed: int, batch_size: int, group: int = 50) -> None:
        super().__init__(len(lengths), seed)
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.group = group

    def _shuffle(self, random: torch.Generator) -> Tensor:
        from transformers.trainer_pt_utils import get_length_grouped_indices

        indices = get_length_grouped_indices(self.lengths, self.batch_size, self.group, random)
        return torch.tensor(indices)
