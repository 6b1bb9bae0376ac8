"""The lowest held-out loss of a run: at which step, how long ago, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from ..methods.perturb import replaced


class Best:
    """Keeps count of held-out measurements as Transformers' `EarlyStoppingCallback` does, with a
    threshold of 0 (https://huggingface.co/docs/transformers/main_classes/callback).

    A measurement is a new lowest or counts against the patience, as equal ones and those that are
    not finite do. The first is the base model's, at step 0.

    Args:
        parameters: whose values are kept at each new lowest, on the CPU; none to only count. Their
            order identifies them in a checkpoint.
        patience: measurements in a row without a new lowest that end a run; None for no end.

    Attributes:
        step, loss: of the lowest measurement; None before the first.
        since: measurements after it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], patience: int | None) -> None:
        self.parameters, self.patience = list(parameters), patience
        self.step: int | None = None
        self.loss: float | None = None
        self.since = 0
        self._kept = self._copies()

    def lowered_by(self, loss: float, step: int) -> bool:
        """Take note of a measurement; whether it is a new lowest, whose weights are to be kept."""
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            self.step, self.loss, self.since = step, loss, 0
            return True
        self.since += 1
        return False

    def keep(self) -> None:
        """Keep the values that the parameters hold now."""
        self._kept = self._copies()

    def _copies(self) -> list[Tensor]:
        return [p.detach().to("cpu", copy=True) for p in self.parameters]

    @property
    def exhausted(self) -> bool:
        """Whether the patience is at its end."""
        return self.patience is not None and self.since >= self.patience

    def applied(self) -> AbstractContextManager[None]:
        """Within the context the parameters hold what was kept; then their own values again."""
        own = zip(self.parameters, self._kept, strict=True)
        return replaced(self.parameters, [value.to(p.device) for p, value in own])

    def tensors(self) -> dict[str, Tensor]:
        """What was kept, by "best/number"."""
        return {f"best/{i}": value for i, value in enumerate(self._kept)}

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beside the tensors."""
        return {"step": self.step, "loss": self.loss, "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.step, self.loss, self.since = (state[key] for key in ("step", "loss", "since"))
