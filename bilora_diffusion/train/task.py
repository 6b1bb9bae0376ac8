"""The interface between the loop and a task, `Task` and `MicroBatch`, and the order of samples.

A sample order is an endless, reproducible stream: it maps each position to a sample number.
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

# How often each sample appears in one pass over the data: one number for all, or one per sample.
Repeats = int | Sequence[int]


@dataclass(frozen=True)
class MicroBatch:
    """The fixed inputs of one forward and backward pass.

    Attributes:
        slots: positions of the samples in the batch of the whole step.
        names: names of the samples, for error messages.
        digests: hash of each slot's data and noise. Equal hashes prove that two runs used the same
            inputs.
        inputs: arguments of the task's module.
        levels: noise levels of the images, in the units of the log.
    """

    slots: tuple[int, ...]
    names: tuple[str, ...]
    digests: tuple[str, ...]
    inputs: dict[str, Any] = field(repr=False)
    levels: tuple[float, ...] = ()

    def on(self, device: torch.device) -> dict[str, Any]:
        """Return the inputs on a device."""
        inputs = self.inputs
        is_gpu = device.type == "cuda"
        if is_gpu:
            # Only a copy from pinned memory can run in the background.
            inputs = recursively_apply(lambda t: t if t.is_cuda else t.pin_memory(), inputs)
        return cast(dict[str, Any], send_to_device(inputs, device, non_blocking=is_gpu))


Config = TypeVar("Config", bound=RunConfig)


class Task(Protocol[Config]):
    """The data and models of a training run; several runs can share a task.

    Attributes:
        cfg: configuration of the run.
        models: models that are trained, by name.
        num_samples: number of samples in one epoch.
        has_heldout: whether there are held-out samples, on which a loss can be measured.
    """

    cfg: Config
    models: dict[str, nn.Module]
    num_samples: int
    has_heldout: bool

    # A property, since the type of a task's own attribute is narrower.

    @property
    def module(self) -> nn.Module:
        """Module with the trained models as children; ``module(inputs)`` is the loss per slot."""
        ...

    def data_summary(self) -> str:
        """Return a short description of the training data, such as "23 images at 1024 px"."""
        ...

    def targets(self) -> list[Target]:
        """Return the models to train, with their adapters' shapes and their learning rates."""
        ...

    def micro_batches(
        self, schedule: Sequence[tuple[int, tuple[int, ...]]], step_size: int
    ) -> Iterator[MicroBatch]:
        """Yield a micro-batch for each (step, slots) of a schedule, in order."""
        ...

    def heldout_loss(self, evaluating: AbstractContextManager[Any]) -> dict[str, float]:
        """Compute "heldout_loss" and other measures by name; {} without held-out data.

        The values do not depend on random numbers.
        """
        ...

    def validate(
        self, step: int, folder: Path, evaluating: AbstractContextManager[Any]
    ) -> dict[str, float]:
        """Write validation samples to ``validation/step-N``; return their metrics, if any."""
        ...

    def training_content(self) -> Sequence[SampleContent]:
        """Return the names and hashes of the training samples, in order."""
        ...

    def heldout_content(self) -> Sequence[SampleContent]:
        """Return the names and hashes of the held-out samples, in order; [] if there are none."""
        ...

    def with_config(self, cfg: Config) -> Task[Config]:
        """Return a task with another configuration and the same models and encoded data."""
        ...


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode and disable gradients within the context."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


@contextmanager
def explain_memory_errors(action: str, fix: str) -> Iterator[None]:
    """Turn an out-of-memory error of the device within the context into one sentence.

    Args:
        action: failed action, such as "sampling 4 images".
        fix: advice for the user, without a period.

    Raises:
        TrainingError: the device is out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # The frames of the traceback hold the tensors that filled the memory.
        error.with_traceback(None)
        raise TrainingError(f"{action} needs more memory than is left: {fix}.") from error


def precision(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first floating-point weight, in which the model computes.

    4-bit weights are ignored, since they are stored as integers, and so are adapters, since their
    dtype may differ from the model's.
    """
    dtypes = (
        weight.dtype
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and not is_adapter_weight(name)
    )
    return next(dtypes)


class SampleOrder:
    """A stream of sample numbers that consists of shuffled epochs.

    Each epoch is a permutation that depends on (seed, epoch) and contains each sample as often as
    `repeats` specifies. Positions are absolute, so a resumed run only needs to know its step.

    Args:
        n: number of samples.
        seed: seed of the run.
        repeats: number of times that a sample appears in an epoch.
        purpose: name of the stream. Other names give other streams for the same seed, for example
            for class images.
    """

    def __init__(self, n: int, seed: int, repeats: Repeats = 1, purpose: str = "order") -> None:
        self.seed = seed
        self.purpose = purpose
        counts = torch.as_tensor(repeats).expand(n)  # (n,)
        # All samples come first, then those that appear at least twice, and so on.
        passes = [(counts > turn).nonzero()[:, 0] for turn in range(int(counts.max()))]
        self._samples = torch.cat(passes)
        # One epoch is cached, since positions are read in order.
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        """Return the number of positions in one epoch: the sum of all samples' repeats."""
        return len(self._samples)

    def sample(self, position: int) -> int:
        """Return the sample, in [0, n), at an absolute position; position 0 starts epoch 0."""
        epoch, offset = divmod(position, len(self))
        return int(self._samples[self.permutation(epoch)[offset]])

    def permutation(self, epoch: int) -> Tensor:
        """Return the order of one epoch, (len(self),), as indices into the repeated samples."""
        if epoch != self._epoch:
            self._permutation = self._shuffle(generator(self.purpose, self.seed, epoch))
            self._epoch = epoch
        return self._permutation

    def _shuffle(self, random: torch.Generator) -> Tensor:
        """Return a permutation of the positions of an epoch."""
        return torch.randperm(len(self), generator=random)


class KindsOrder:
    """A stream like `SampleOrder` in which all samples of a step have the same kind.

    Each kind has its own shuffled stream, which continues from step to step. In every pass over the
    data, a kind gets as many steps as its samples fill, so in the long run each sample appears as
    often as `repeats` specifies, even if its kind is rare. The steps of a pass are shuffled.

    Args:
        kinds: kind of each sample.
        seed: seed of the run.
        step_size: number of samples per step.
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
            # The stream depends on the kind itself, not on its index, so that a new kind does not
            # change the order of the others.
            self._orders[kind] = SampleOrder(len(members), seed, member_counts, f"order of {kind}")
        self._passes = 0
        # Each step's kind, and the number of earlier steps with this kind.
        self._steps: list[tuple[Hashable, int]] = []
        self._step_counts: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        """Return the number of samples in one pass."""
        return sum(len(order) for order in self._orders.values())

    def sample(self, position: int) -> int:
        """Return the sample at an absolute position; position 0 starts the first step."""
        step, slot = divmod(position, self.step_size)
        while len(self._steps) <= step:
            self._add_pass()
        kind, number = self._steps[step]
        member = self._orders[kind].sample(number * self.step_size + slot)
        return self._members[kind][member]

    def _add_pass(self) -> None:
        """Add the steps of one more pass over the data."""
        kinds: list[Hashable] = []  # one for each new step
        for kind, order in self._orders.items():
            # After n passes, a kind has had floor((n * size + phase) / step_size) steps. Because of
            # the random phase, the kinds do not all round up in the same pass.
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
    """A stream like `SampleOrder` in which the samples of a batch have similar lengths.

    Each epoch is sorted like Transformers' ``group_by_length``: a permutation that depends on
    (seed, epoch) is divided into groups of batches, and each group is sorted by length, longest
    first. The longest sample of all is swapped with the first one, so that an out-of-memory error
    occurs in the first step or never.

    Args:
        lengths: number of tokens of each sample.
        seed: seed of the run.
        batch_size: number of samples per batch.
        group: number of batches per group.
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
