"""Weights that a run exports: those of the last or of the best step, averaged or not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .. import adapters
from ..adapters import PRIMARY
from ..config.run import RunConfig
from ..core.errors import UserError
from ..methods import Method
from ..methods.perturb import replaced


class Best:
    """The lowest held-out measurement so far, and the weights at it.

    It counts as Transformers' `EarlyStoppingCallback` does with a threshold of 0
    (https://huggingface.co/docs/transformers/main_classes/callback): a measurement that is not a
    new lowest one counts against the patience, also an equal one and one that is not finite. The
    measurement of step 0 does not count: there the adapters do nothing.

    Args:
        parameters: parameters whose values are stored at each new lowest, on the CPU; none to count
            only.
        patience: measurements in a row without a new lowest one that end a run; None for no end.

    Attributes:
        step: step of the lowest measurement; None before the first finite one.
        measurement: the lowest measurement, of a loss or a distance; None before the first.
        since: measurements after it.
        values: the parameters' values at it, in their order.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], patience: int | None) -> None:
        self.parameters = list(parameters)
        self.patience = patience
        self.step: int | None = None
        self.measurement: float | None = None
        self.since = 0
        self.store()

    def is_lowered_by(self, measurement: float, step: int) -> bool:
        """Count a measurement; True for a new lowest one, whose weights the caller stores."""
        if step == 0:
            return False
        # An equal one is no new lowest: otherwise a constant loss would never end a run.
        is_lower = self.measurement is None or measurement < self.measurement
        if math.isfinite(measurement) and is_lower:
            self.step = step
            self.measurement = measurement
            self.since = 0
            return True
        self.since += 1
        return False

    def store(self) -> None:
        """Store the values that the parameters have now."""
        # On the CPU, so that the run takes no more memory of the device.
        self.values = [p.detach().to("cpu", copy=True) for p in self.parameters]

    @property
    def is_exhausted(self) -> bool:
        """True if the patience has run out."""
        return self.patience is not None and self.since >= self.patience

    def applied(self) -> AbstractContextManager[None]:
        """Context manager: sets the parameters to the stored values and restores them afterwards."""
        values = []
        for parameter, value in zip(self.parameters, self.values, strict=True):
            values.append(value.to(parameter.device))
        return replaced(self.parameters, values)


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
        # One call for all tensors: with one for each, a step of SDXL made 3,360 small operations.
        torch._foreach_mul_(self.values, 1 - weight)
        torch._foreach_add_(self.values, self.parameters, alpha=weight)


class Outcome:
    """The average of the trained weights and those of the best step, if a run stores them.

    The average finds flatter minima at almost no cost (Izmailov et al. 2018,
    https://arxiv.org/abs/1803.05407). A and B are averaged separately.

    Args:
        method: method whose adapters are attached.
        cfg: training configuration.

    Attributes:
        average: average of the steps so far; None without ``--use_ema``.
        best: the lowest held-out measurement so far, and its weights with ``--keep_best``.
    """

    def __init__(self, method: Method, cfg: RunConfig) -> None:
        self._method = method
        self._cfg = cfg
        self.begin()

    def begin(self) -> None:
        """Start from the weights as they are now."""
        cfg = self._cfg
        # The weights of the result; once, since the walk over SDXL's UNet takes 53 ms.
        self._weights = self._method.result_parameters()
        self.average = Average(self._weights, cfg.ema_decay) if cfg.use_ema else None
        self.best = Best(self._weights if cfg.keep_best else (), cfg.early_stopping_patience)

    def update(self) -> None:
        """Take in the weights of one more step."""
        if self.average is not None:
            self.average.update()

    def note_measurement(self, value: float | None, step: int) -> None:
        """Count a measurement of the current weights, which is the same in every process.

        Args:
            value: of ``heldout_measure``; None without a validation set.
            step: step of the weights.

        Raises:
            UserError: there is none, and an option needs it.
        """
        if value is None:
            if self._cfg.keep_best or self.best.patience is not None:
                raise UserError(
                    "--keep_best and --early_stopping_patience need held-out data, and there is"
                    " none here: give some, or drop them."
                )
        elif self.best.is_lowered_by(value, step):
            # The measurement was of the average, if there is one.
            with self.averaged():
                self.best.store()

    def averaged(self) -> AbstractContextManager[None]:
        """Within the context the trained weights are their average, if averages are stored."""
        if self.average is None:
            return contextlib.nullcontext()
        return replaced(self._weights, self.average.values)

    @property
    def best_step(self) -> int | None:
        """The best step, if the run exports it; without a finite measurement there is none."""
        return self.best.step if self._cfg.keep_best else None

    def applied(self) -> AbstractContextManager[None]:
        """Context manager: the trained weights are those that the run exports."""
        return self.averaged() if self.best_step is None else self.best.applied()

    def step(self, last_step: int) -> int:
        """Step of the weights that a run exports which ended after `last_step`."""
        return last_step if self.best_step is None else self.best_step

    def results(self) -> dict[str, Any]:
        """Figures for the run's record: the early end, and the best step if the run exports it."""
        results: dict[str, Any] = {}
        if self.best.patience is not None:
            results["stopped_early"] = self.best.is_exhausted
        if self._cfg.keep_best:
            results["best_step"] = self.best.step
            results[f"best_{self._cfg.heldout_measure}"] = self.best.measurement
        return results

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, by kind and place among the weights."""
        tensors = {}
        if self.average is not None:
            for place, value in enumerate(self.average.values):
                tensors[f"average/{place}"] = value
        for place, value in enumerate(self.best.values):
            tensors[f"best/{place}"] = value
        return tensors

    def state_dict(self) -> dict[str, Any]:
        """State that a resume or an export (`export_facts`) needs in addition to the tensors."""
        best = self.best
        return {
            "average": None if self.average is None else {"steps": self.average.steps},
            "best": {"step": best.step, "loss": best.measurement, "since": best.since},
            "result": export_facts(self._method),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        if self.average is not None:
            self.average.steps = state["average"]["steps"]
        self.best.step = state["best"]["step"]
        self.best.measurement = state["best"]["loss"]
        self.best.since = state["best"]["since"]


def export_facts(method: Method) -> dict[str, Any]:
    """Facts in JSON with which an export reads the tensors of a checkpoint.

    Returns:
        "adapters", PEFT's configuration of each target's primary, and "averaged", keys in
        `Method.tensors` of the averaged weights, in the order of the averages; {} for a method that
        trains whole models.
    """
    if method.exports_weights:
        return {}
    configs = {}
    # In the order of `result_parameters`, by which a checkpoint numbers the averages.
    averaged_keys = []
    for target in method.targets:
        configs[target.name] = adapters.lora_config(target.model, PRIMARY)
        for name in adapters.named_parameters(target.model, PRIMARY):
            averaged_keys.append(f"{target.name}/{PRIMARY}/{name}")
        for name in adapters.head_parameters(target.model, PRIMARY):
            averaged_keys.append(f"{target.name}/whole/{name}")
    return {"adapters": configs, "averaged": averaged_keys}
