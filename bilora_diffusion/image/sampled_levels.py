"""Sampling of training noise levels within a range (``--timestep_range``)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..core.errors import UserError

ALL_LEVELS = (0.0, 1.0)  # default of ``--timestep_range``
# A range is refused if it contains less than this fraction of the sampled levels, since sampling
# repeats until a level is in the range.
SMALLEST_SHARE = 1e-4
SAMPLES_OF_SHARE = 100_000  # number of samples for the estimate of this fraction


class SampledLevels(ABC):
    """Base class of noise schedules, which samples noise levels within a range.

    A level outside the range is sampled again, so that the distribution within the range keeps its
    shape. The full range accepts every sample.
    """

    level_range: tuple[float, float]  # lowest and highest level, as fractions of the full noise

    @abstractmethod
    def sample_all(self, count: int, random: torch.Generator) -> Tensor:
        """Sample indices of noise levels from the full range, (count,)."""

    @abstractmethod
    def share(self, level_index: Tensor) -> Tensor:
        """Convert indices of noise levels to fractions of the full noise."""

    def in_range(self, level_index: Tensor) -> Tensor:
        """Return, for each index, whether the noise level is in the range."""
        if self.level_range == ALL_LEVELS:
            return torch.ones_like(level_index, dtype=torch.bool)
        low, high = self.level_range
        share = self.share(level_index).double()
        return (share >= low) & (share <= high)

    def sample_level_index(self, random: torch.Generator) -> Tensor:
        """Sample the index of a noise level within the range, as a 0-d tensor."""
        while True:
            level_index = self.sample_all(1, random)[0]
            if self.in_range(level_index):
                return level_index

    def require_samples(self) -> None:
        """Raise UserError if the range has so few levels that sampling would hardly ever hit it."""
        if self.level_range == ALL_LEVELS:
            return
        random = torch.Generator().manual_seed(0)
        share = float(self.in_range(self.sample_all(SAMPLES_OF_SHARE, random)).double().mean())
        if share < SMALLEST_SHARE:
            low, high = self.level_range
            raise UserError(
                f"--timestep_range {low:g} {high:g} has fewer than 1 in {1 / SMALLEST_SHARE:,.0f}"
                " of the noise levels that this run samples: widen it."
            )
