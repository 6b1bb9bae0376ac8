"""Averages of what is trained: a flat minimum for next to nothing.

Izmailov et al. 2018 (https://arxiv.org/abs/1803.05407) found that averaged weights lie in wider
minima than those that the optimizer visits. The factors A and B are averaged each on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..methods.perturb import restored


class Average:
    """An exponential moving average: diffusers' `EMAModel` over a list of parameters, whose order
    identifies them in a checkpoint.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the start is forgotten soon.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self._ema = EMAModel(self.parameters, decay=decay, foreach=True)

    def update(self) -> None:
        """Take in the parameters of one more step."""
        self._ema.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the parameters hold their average; then what they held before."""
        with restored(self.parameters):
            with torch.no_grad():
                for own, average in zip(self.parameters, self._ema.shadow_params, strict=True):
                    own.copy_(average)
            yield

    def tensors(self) -> dict[str, Tensor]:
        """The averages, by "average/number"."""
        return {f"average/{i}": value for i, value in enumerate(self._ema.shadow_params)}

    def state_dict(self) -> dict[str, Any]:
        """State that a resume needs beside the averages."""
        return {"steps": self._ema.optimization_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._ema.optimization_step = state["steps"]
