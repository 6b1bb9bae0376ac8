"""A run folder as an evaluation sees it: a metric over training, digests of inputs, step times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bilora_diffusion.errors import UserError, did_you_mean
from bilora_diffusion.run import runlog

TRAINING = "train_grid_loss"
"""Loss on the training set, measured on the grid on which held-out loss is measured."""


@dataclass(frozen=True)
class Run:
    """A finished run as its folder has it.

    Args:
        curve: (step, metric, training loss or None) at each measurement.
        digests: step -> digest of the step's inputs.
        seconds: of each step.
    """

    curve: list[tuple[int, float | None, float | None]]
    digests: dict[int, str]
    seconds: list[float]

    @property
    def last(self) -> tuple[float | None, float | None]:
        """Metric and training loss at the last measurement."""
        return self.curve[-1][1:] if self.curve else (None, None)

    def best(self, higher_is_better: bool) -> float | None:
        """The best value of the metric over training."""
        values = [value for _, value, _ in self.curve if value is not None]
        return None if not values else max(values) if higher_is_better else min(values)

    def both(self) -> tuple[list[float], list[float]]:
        """Training loss and metric where both were measured."""
        pairs = [(t, v) for _, v, t in self.curve if v is not None and t is not None]
        return [t for t, _ in pairs], [v for _, v in pairs]


def read(folder: Path, metric: str) -> Run:
    """A run folder's curve of ``metric``, digests and step times.

    Raises:
        UserError: ``metrics.jsonl`` is damaged.
    """
    rows = runlog.read_metrics(folder)
    return Run(
        curve=[(row["step"], row[metric], row.get(TRAINING)) for row in rows if metric in row],
        digests={row["step"]: row["digest"] for row in rows if row.get("digest")},
        seconds=[row["seconds"] for row in rows if row.get("seconds") is not None],
    )


def same_inputs(one: Run, other: Run) -> bool:
    """Whether two runs saw the same inputs at each step that both took; False without any."""
    steps = one.digests.keys() & other.digests.keys()
    return bool(steps) and all(one.digests[step] == other.digests[step] for step in steps)


def paired(arm: Mapping[int, Run], control: Mapping[int, Run]) -> bool | None:
    """Whether an arm's runs can be compared with the control's seed by seed; None without any."""
    seeds = arm.keys() & control.keys()
    return all(same_inputs(arm[seed], control[seed]) for seed in seeds) if seeds else None


def require_metric(folders: list[Path], metric: str) -> None:
    """Refuse a metric that none of the runs has.

    Raises:
        UserError: it names those that they have.
    """
    rows = [row for folder in folders for row in runlog.read_metrics(folder)]
    known = {key for row in rows for key, value in row.items() if isinstance(value, float)}
    if rows and metric not in {key for row in rows for key in row}:
        raise UserError(
            f'no run has the metric "{metric}"{did_you_mean(metric, known)}: use --metric with one'
            f" of {', '.join(sorted(known))}."
        )
