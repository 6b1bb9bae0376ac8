"""Weights that a run leaves: the last step's or the best one's, averaged or not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from .. import adapters
from ..adapters import PRIMARY
from ..config.run import RunConfig
from ..core.errors import UserError
from ..methods import Method
from ..methods.perturb import replaced

_COUNTED = ("step", "loss", "since")


class Best:
    """Keeps count of held-out measurements as Transformers' `EarlyStoppingCallback` does, with a
    threshold of 0 (https://huggingface.co/docs/transformers/main_classes/callback).

    A measurement is a new lowest or counts against the patience, as equal ones and those that are
    not finite do. The first is the base model's, at step 0.

    Args:
        parameters: whose values are kept at each new lowest, on the CPU; none to only count.
        patience: measurements in a row without a new lowest that end a run; None for no end.

    Attributes:
        step, loss: of the lowest measurement; None before the first.
        since: measurements after it.
        kept: the parameters' values at it, in their order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], patience: int | None) -> None:
        self.parameters, self.patience = list(parameters), patience
        self.step: int | None = None
        self.loss: float | None = None
        self.since = 0
        self.keep()

    def lowered_by(self, loss: float, step: int) -> bool:
        """Take note of a measurement; whether it is a new lowest, whose weights are to be kept."""
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            self.step, self.loss, self.since = step, loss, 0
            return True
        self.since += 1
        return False

    def keep(self) -> None:
        """Keep the values that the parameters hold now."""
        self.kept = [p.detach().to("cpu", copy=True) for p in self.parameters]

    @property
    def exhausted(self) -> bool:
        """Test that the patience is at its end."""
        return self.patience is not None and self.since >= self.patience

    def applied(self) -> AbstractContextManager[None]:
        """Within the context the parameters hold what was kept; then their own values again."""
        own = zip(self.parameters, self.kept, strict=True)
        return replaced(self.parameters, [value.to(p.device) for p, value in own])


class Average:
    """Exponential moving average of parameters, corrected for its start.

    After step t it is (1 - d) / (1 - d^t) sum_i d^(t - i) w_i over the steps i = 1 ... t, with
    decay d: the same correction as that of Adam's moments (Kingma and Ba 2015, Section 3,
    https://arxiv.org/abs/1412.6980). So the weights before the first step have no part in it, and
    the decay holds from the first step on.

    Args:
        parameters: what is averaged; until the first step the average is their values now.
        decay: d, in [0, 1).

    Attributes:
        values: the average of each parameter, in their order, dtypes and devices.
        steps: optimizer steps in it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.decay = decay
        self.values = [parameter.detach().clone() for parameter in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters' values after one more step."""
        self.steps += 1
        # avg_t = (1 - weight) avg_(t-1) + weight w_t gives the sum above; weight is 1 at step 1.
        weight = (1 - self.decay) / (1 - self.decay**self.steps)
        torch._foreach_mul_(self.values, 1 - weight)
        torch._foreach_add_(self.values, self.parameters, alpha=weight)


class Outcome:
    """The average of what is trained and the best of its steps, as far as a run keeps them.

    The average is a flat minimum for next to nothing (Izmailov et al. 2018,
    https://arxiv.org/abs/1803.05407), of A and of B each on its own.

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
        self._weights, cfg = self._method.clip_parameters(), self._cfg
        self.average = Average(self._weights, cfg.ema_decay) if cfg.use_ema else None
        self.best = Best(self._weights if cfg.keep_best else (), cfg.early_stopping_patience)

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

    def averaged(self) -> AbstractContextManager[None]:
        """Within the context what is trained holds its average, where averages are kept."""
        if self.average is None:
            return contextlib.nullcontext()
        return replaced(self._weights, self.average.values)

    def applied(self) -> AbstractContextManager[None]:
        """Within the context what is trained holds what the run leaves."""
        return self.best.applied() if self._cfg.keep_best else self.averaged()

    def step(self, last: int) -> int:
        """The step whose weights a run leaves that ended after ``last``."""
        return last if self.best.step is None or not self._cfg.keep_best else self.best.step

    def results(self) -> dict[str, Any]:
        """The early end, and the best step where that is what it leaves; for its record."""
        best = self.best
        kept = {"best_step": best.step, "best_heldout_loss": best.loss}
        return {
            **({} if best.patience is None else {"stopped_early": best.exhausted}),
            **(kept if self._cfg.keep_best else {}),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, by kind and place among the weights."""
        averages = self.average.values if self.average is not None else ()
        kinds = {"average": averages, "best": self.best.kept}
        return {f"{kind}/{i}": t for kind, own in kinds.items() for i, t in enumerate(own)}

    def state_dict(self) -> dict[str, Any]:
        """State that a resume needs beside the tensors, and an export (`described`)."""
        return {
            "average": None if self.average is None else {"steps": self.average.steps},
            "best": {name: getattr(self.best, name) for name in _COUNTED},
            "result": described(self._method),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        if self.average is not None:
            self.average.steps = state["average"]["steps"]
        for name in _COUNTED:
            setattr(self.best, name, state["best"][name])


def described(method: Method) -> dict[str, Any]:
    """Facts that an export needs of a checkpoint beside its tensors, as JSON can hold them.

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
                *(f"{name}/whole/{p}" for p in adapters.head_parameters(model, PRIMARY)),
            )
        ],
    }
