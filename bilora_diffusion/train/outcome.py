"""The weights that a run exports: those of the last step or of the best step."""

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
    """The best held-out measurement so far, and the weights that it belongs to.

    Measurements count as in Transformers' `EarlyStoppingCallback` with a threshold of 0
    (https://huggingface.co/docs/transformers/main_classes/callback): every measurement that is not
    a new best counts against the patience, including an equal and a non-finite one. The measurement
    of step 0 does not count, since nothing is trained yet.

    Args:
        parameters: parameters whose values are stored on the CPU at each new best; empty to store
            nothing.
        patience: number of consecutive measurements without a new best that ends a run; None to
            never end it.
        measure: name of the measured quantity in the log.

    Attributes:
        step: step of the best measurement; None before the first finite one.
        measurement: best measurement; None before the first finite one.
        since: number of measurements after the best one.
        values: values of the parameters at the best measurement, in the order of the parameters.
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
        """Count a measurement and return whether it is a new best.

        If it is, the caller must store the weights.
        """
        if step == 0:
            return False
        # An equal measurement is not a new best: otherwise a constant loss would never end a run.
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
        """Store the current values of the parameters."""
        # They are stored on the CPU to save memory of the device.
        self.values = [p.detach().to("cpu", copy=True) for p in self.parameters]

    @property
    def is_exhausted(self) -> bool:
        """Whether the patience has run out."""
        return self.patience is not None and self.since >= self.patience

    def applied(self) -> AbstractContextManager[None]:
        """Return a context manager that sets the parameters to the stored values until its exit."""
        values = []
        for parameter, value in zip(self.parameters, self.values, strict=True):
            values.append(value.to(parameter.device))
        return replaced(self.parameters, values)


class Outcome:
    """The weights that a run exports.

    Args:
        method: method whose adapters are attached to the models.
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
            value: value of ``heldout_measure``; None if there is no held-out data.
            step: step of the weights.

        Raises:
            UserError: there is no value, but an option needs it.
        """
        if value is None:
            if self._cfg.keep_best or self.best.patience is not None:
                raise UserError(
                    "--keep_best and --early_stopping_patience need held-out data, but there is"
                    " none: give some, or drop these options."
                )
        elif self.best.is_improved_by(value, step):
            self.best.store()

    @property
    def best_step(self) -> int | None:
        """The best step if the run exports it; None otherwise, or if no measurement was finite."""
        return self.best.step if self._cfg.keep_best else None

    def applied(self) -> AbstractContextManager[None]:
        """Return a context manager in which the trained weights are those that the run exports."""
        return nullcontext() if self.best_step is None else self.best.applied()

    def step(self, last_step: int) -> int:
        """Return the step of the exported weights for a run that ended after `last_step`."""
        return last_step if self.best_step is None else self.best_step

    def results(self) -> dict[str, Any]:
        """Return values for the record: the measure that decides, an early end, the best step."""
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
        """Return the best weights for a checkpoint, by their index among the weights."""
        tensors = {}
        for place, value in enumerate(self.best.values):
            tensors[f"best/{place}"] = value
        return tensors

    def state_dict(self) -> dict[str, Any]:
        """Return state that a resume or an export (`export_facts`) needs besides the tensors."""
        best = self.best
        return {
            "best": {"step": best.step, "loss": best.measurement, "since": best.since},
            "result": export_facts(self._method),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.best.step = state["best"]["step"]
        self.best.measurement = state["best"]["loss"]
        self.best.since = state["best"]["since"]


def export_facts(method: Method) -> dict[str, Any]:
    """Return the facts that an export needs to read the tensors of a checkpoint, as JSON values.

    Returns:
        "adapters": PEFT's configuration of each target's primary, by target name; {} for a method
        that trains whole models.
    """
    if method.exports_weights:
        return {}
    configs = {}
    for target in method.targets:
        configs[target.name] = adapters.lora_config(target.model, PRIMARY)
    return {"adapters": configs}
