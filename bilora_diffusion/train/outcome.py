"""What a run leaves of its weights: the last step's or the best one's, averaged or not."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor

from .. import adapters
from ..adapters import PRIMARY
from ..errors import UserError
from ..methods import Method
from ..run.config import RunConfig
from .averaging import Average
from .best import Best


class Outcome:
    """The average of what is trained and the best of its steps, as far as a run keeps them.

    Args:
        method: of which the adapters are attached.
        cfg: says what is kept.

    Attributes:
        average: of the steps so far; None without ``--use_ema``.
        best: the lowest held-out loss so far, and its weights with ``--keep_best``.
    """

    def __init__(self, method: Method, cfg: RunConfig) -> None:
        self._method, self._cfg = method, cfg
        self.begin()

    def begin(self) -> None:
        """Start from the weights as they are now."""
        weights, cfg = self._method.clip_parameters(), self._cfg
        self.average = Average(weights, cfg.ema_decay) if cfg.use_ema else None
        self.best = Best(weights if cfg.keep_best else (), cfg.early_stopping_patience)

    def update(self) -> None:
        """Take in the weights of one more step."""
        if self.average is not None:
            self.average.update()

    def measured(self, loss: float | None, step: int) -> None:
        """Take note of a held-out loss of the weights as they are, in every process.

        Args:
            loss: what the main process measured; None without a set, and in the other processes.
            step: at which.

        Raises:
            UserError: there is nothing to measure it on, and options need it.
        """
        (loss,) = broadcast_object_list([loss])
        if loss is None:
            if self._cfg.keep_best or self.best.patience is not None:
                raise UserError(
                    "--keep_best and --early_stopping_patience need held-out data, and there is"
                    " none here: give some, or drop them."
                )
        elif self.best.lowered_by(loss, step):
            with self.averaged():
                self.best.keep()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within the context what is trained holds its average, where averages are kept."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Within the context what is trained holds what the run leaves."""
        return self.best.applied() if self._cfg.keep_best else self.averaged()

    def step(self, last: int) -> int:
        """The step whose weights a run leaves that ended after ``last``."""
        return last if self.best.step is None or not self._cfg.keep_best else self.best.step

    def results(self) -> dict[str, Any]:
        """What a run's record says of it: whether it ended early, and the best step where that is
        what the run leaves.
        """
        best, patience = self.best, self._cfg.early_stopping_patience
        kept = {"best_step": best.step, "best_heldout_loss": best.loss}
        return {
            **({} if patience is None else {"stopped_early": best.exhausted}),
            **(kept if self._cfg.keep_best else {}),
        }

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, by name."""
        averages = {} if self.average is None else self.average.tensors()
        return {**averages, **self.best.tensors()}

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beside the tensors, and an export (`described`)."""
        return {
            "average": None if self.average is None else self.average.state_dict(),
            "best": self.best.state_dict(),
            "result": described(self._method),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.best.load_state_dict(state["best"])


def described(method: Method) -> dict[str, Any]:
    """What an export must know of a checkpoint beside its tensors, as JSON can hold it.

    Returns:
        "adapters", PEFT's configuration of each target's primary, and "averaged", the keys in
        `Method.tensors` of what an average is kept of, in its order; {} where whole models are
        trained.
    """
    if method.exports_weights:
        return {}
    models = {target.name: target.model for target in method.targets}
    return {
        "adapters": {name: adapters.lora_config(model, PRIMARY) for name, model in models.items()},
        "averaged": [
            key
            for name, model in models.items()
            for key in (
                *(f"{name}/{PRIMARY}/{p}" for p in adapters.named_parameters(model, PRIMARY)),
                *(f"{name}/whole/{p}" for p in adapters.whole(model, PRIMARY)),
            )
        ],
    }
