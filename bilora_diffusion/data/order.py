"""Which sample stands at which position of an endless, reproducible stream."""

from __future__ import annotations

import torch
from torch import Tensor

from .seeds import generator


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
            self._epoch, self._permutation = epoch, torch.randperm(len(self), generator=draws)
        return self._permutation
