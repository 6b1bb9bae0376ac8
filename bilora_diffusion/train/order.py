"""Which sample stands at which position of an endless, reproducible stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..seeds import generator


class SampleOrder:
    """A stream of sample numbers: one shuffled pass over the data after the other.

    Every epoch is a permutation drawn from (seed, epoch) in which each sample appears ``repeats``
    times. A position is absolute, so a resumed run needs nothing but its step count.

    Args:
        n: samples in the data set.
        seed: of the run.
        repeats: how often each sample appears in one epoch.
        purpose: keeps two streams of the same run apart (instance and class images).

    Raises:
        ValueError: ``n`` or ``repeats`` is below 1.
    """

    def __init__(self, n: int, seed: int, repeats: int = 1, purpose: str = "order") -> None:
        if n < 1 or repeats < 1:
            raise ValueError(f"n and repeats must be at least 1, not {n} and {repeats}")
        self.n, self.seed, self.repeats, self.purpose = n, seed, repeats, purpose
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        """Positions of one epoch: ``n * repeats``."""
        return self.n * self.repeats

    def sample(self, position: int) -> int:
        """The sample, in [0, n), at the absolute ``position`` (0 is the first of epoch 0).

        Raises:
            ValueError: the position is negative.
        """
        if position < 0:
            raise ValueError(f"a position is at least 0, not {position}")
        epoch, offset = divmod(position, len(self))
        return int(self.permutation(epoch)[offset]) % self.n

    def permutation(self, epoch: int) -> Tensor:
        """The shuffled positions of one epoch, (n * repeats,); sample number is value modulo n."""
        if epoch != self._epoch:
            draws = generator(self.purpose, self.seed, epoch)
            self._epoch, self._permutation = epoch, self._draw(draws)
        return self._permutation

    def _draw(self, draws: torch.Generator) -> Tensor:
        return torch.randperm(len(self), generator=draws)


class LengthGroupedOrder(SampleOrder):
    """A stream like ``SampleOrder``'s in which the samples of a batch are about equally long.

    Each epoch is what Transformers' ``group_by_length`` makes of a permutation drawn from (seed,
    epoch): groups of ``group`` batches, each sorted by length, longest first. The longest sample of
    all changes places with the first, so that memory runs out in the first step or never.

    Args:
        lengths: of each sample, in tokens.
        seed: of the run.
        batch_size: samples of one batch.
        group: batches that are sorted together.
        purpose: keeps two streams of the same run apart.

    Raises:
        ValueError: no lengths, or ``batch_size`` or ``group`` is below 1.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seed: int,
        batch_size: int,
        group: int = 50,
        purpose: str = "order",
    ) -> None:
        super().__init__(len(lengths), seed, purpose=purpose)
        if batch_size < 1 or group < 1:
            raise ValueError(f"batch_size and group are at least 1, not {batch_size} and {group}")
        self.lengths, self.batch_size, self.group = list(lengths), batch_size, group

    def _draw(self, draws: torch.Generator) -> Tensor:
        from transformers.trainer_pt_utils import get_length_grouped_indices as grouped

        return torch.tensor(grouped(self.lengths, self.batch_size, self.group, draws))
