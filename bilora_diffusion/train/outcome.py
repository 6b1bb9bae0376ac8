"""Weights that a run exports: those of the last step, or of the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from .. import adapters
from ..adapters import PRIMARY
from ..config.run import RunConfig
from ..core.errors import UserError
from ..core.values import is_better
from ..methods import Method
from ..methods.perturb import replaced


class Best:
    """The best held-out measurement so far, and the weights at it.

    It counts as Transformers' `EarlyStoppingCallback` does with a threshold of 0
    (https://huggingface.co/docs/transformers/main_classes/callback): a measurement that is not a
    new best one counts against the patience, also an equal one and one that is not finite. The
    measurement of step 0 does not count: there the adapters do nothing.

    Args:
        parameters: parameters whose values are stored at each new best, on the CPU; none to count
            only.
        patience: measurements in a row without a new best one that end a run; None for no end.
        measure: what is measured, by its name in the log.

    Attributes:
        step: step of the best measurement; None before the first finite one.
        measurement: the best measurement; None before the first.
        since: measurements after it.
        values: the parameters' values at it, in their order.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], patience: int | None, measure: str
    ) -> None:
        self.parameters = list(parameters)
        self.patience = patience
        self.measure = measure
        self.step: int | None = None
        self.measurement: float | None = None
        self.since = 0
        self.store()

    def is_improved_by(self, measurement: float, step: int) -> bool:
        """Count a measurement; True for a new best one, whose weights the caller stores."""
        if step == 0:
            return False
        # An equal one is not a new best: otherwise a constant loss would never end a run.
        is_new_best = self.measurement is None or is_better(
            self.measure, measurement, self.measurement
        )
        if math.isfinite(measurement) and is_new_best:
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
        """Context manager: sets the parameters to the stored values, and restores them."""
        values = []
        for parameter, value in zip(self.parameters, self.values, strict=True):
            values.append(value.to(parameter.device))
        return replaced(self.parameters, values)


class Outcome:
    """The weights that a run exports.

    Args:
        method: method whose adapters are attached.
        cfg: training configuration.

    Attributes:
        best: the best held-out measurement so far, and its weights with ``--keep_best``.
    """

    def __init__(self, method: Method, cfg: RunConfig) -> None:
        self._method = method
        self._cfg = cfg
        weights = method.result_parameters() if cfg.keep_best else ()
        self.best = Best(weights, cfg.early_stopping_patience, cfg.heldout_measure)

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
        elif self.best.is_improved_by(value, step):
            self.best.store()

    @property
    def best_step(self) -> int | None:
        """The best step, if the run exports it; without a finite measurement there is none."""
        return self.best.step if self._cfg.keep_best else None

    def applied(self) -> AbstractContextManager[None]:
        """Context manager: the trained weights are those that the run exports."""
        return nullcontext() if self.best_step is None else self.best.applied()

    def step(self, last_step: int) -> int:
        """Step of the weights that a run exports which ended after `last_step`."""
        return last_step if self.best_step is None else self.best_step

    def results(self) -> dict[str, Any]:
        """Values for the run's record: the early end, and the best step if the run exports it."""
        results: dict[str, Any] = {}
        if self._cfg.depends_on_heldout:
            results["chosen_by"] = self._cfg.heldout_measure
        if self.best.patience is not None:
            results["stopped_early"] = self.best.is_exhausted
        if self._cfg.keep_best:
            results["best_step"] = self.best.step
            results[f"best_{self._cfg.heldout_measure}"] = self.best.measurement
        return results

    def tensors(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, by their places among the weights."""
        tensors = {}
        for place, value in enumerate(self.best.values):
            tensors[f"best/{place}"] = value
        return tensors

    def state_dict(self) -> dict[str, Any]:
        """State that a resume or an export (`export_facts`) needs in addition to the tensors."""
        best = self.best
        return {
            "best": {"step": best.step, "loss": best.measurement, "since": best.since},
            "result": export_facts(self._method),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.best.step = state["best"]["step"]
        self.best.measurement = state["best"]["loss"]
        self.best.since = state["best"]["since"]


def export_facts(method: Method) -> dict[str, Any]:
    """Facts in JSON with which an export reads the tensors of a checkpoint.

    Returns:
        "adapters": PEFT's configuration of each target's primary; {} for a method that trains whole
        models.
    """
    if method.exports_weights:
        return {}
    configs = {}
    for target in method.targets:
        configs[target.name] = adapters.lora_config(target.model, PRIMARY)
    return {"adapters": configs}
