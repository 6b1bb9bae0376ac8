"""What ``python -m eval.landscape`` leaves: ``landscape.json``, typed and versioned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..statistics import Interval, Paired


@dataclass(frozen=True)
class Settings:
    """How the landscape was looked at.

    Args:
        spaces: of "lora" and "full".
        full_weights: "all" weights of the trained models, or those "adapted".
        directions: random directions of each profile.
        positions: space -> the multiples of a direction at which a profile has the loss.
        grid_positions: space -> the same for both axes of the plane; empty without one.
        rho: radius of the SAM sharpness.
        ascent_steps, restarts: of its ascents.
        eigenvalue: whether the top eigenvalue was asked for.
        split, images, levels: what the loss is a mean over; it has images x levels terms.
        seed: of directions and starts.
    """

    spaces: list[str]
    full_weights: str
    directions: int
    positions: dict[str, list[float]]
    grid_positions: dict[str, list[float]]
    rho: float
    ascent_steps: int
    restarts: int
    eigenvalue: bool
    split: str
    images: int
    levels: int
    seed: int


@dataclass(frozen=True)
class SpaceResult:
    """One run in one space.

    Args:
        parameters: how many numbers the space has.
        profiles: (directions, positions), the loss along each direction.
        rise: mean over directions and both ends of the profiles, minus the loss at the middle.
        sharpness: max over ||e|| <= rho of L(w + e) - L(w), as far as the ascent found it.
        one_step: the same at e = rho g / ||g||.
        gradient_norm: at w.
        grid: (positions, positions), the loss on the plane of the first two directions' kind; None
            where it was not measured for this run.
        eigenvalue: the algebraically largest of the Hessian; None where it was not asked for or
            Lanczos did not converge.
        eigenvalue_residual: ||H v - value v||.
    """

    parameters: int
    profiles: list[list[float | None]]
    rise: float | None
    sharpness: float | None
    one_step: float | None
    gradient_norm: float | None
    grid: list[list[float | None]] | None = None
    eigenvalue: float | None = None
    eigenvalue_residual: float | None = None


@dataclass(frozen=True)
class RunResult:
    """One run.

    Args:
        label: unique.
        group: what it is averaged in.
        kind: "adapter", "whole" or "base".
        method, seed: None for the base model.
        source: name of the run folder.
        digest: of the weights.
        loss: at the run's own weights.
        spaces: by name; a run without an adapter has no "lora".
    """

    label: str
    group: str
    kind: str
    method: str | None
    seed: int | None
    source: str
    digest: str
    loss: float
    spaces: dict[str, SpaceResult]


@dataclass(frozen=True)
class Summary:
    """One figure of a group: mean over runs, its 95 % interval, and the difference to the control.

    ``difference`` is paired by seed; None for the control and without a common seed.
    """

    mean: float | None
    interval: Interval | None
    difference: Paired | None


@dataclass(frozen=True)
class GroupSpace:
    """A group in one space.

    Args:
        profile: (positions,), mean over runs and directions of the loss.
        band: (positions,), standard error of that mean over runs; over directions for one run.
        difference: (positions,), how much more the loss rises from the middle than the control's,
            mean over the seeds that both have; None for the control and without such a seed.
        difference_band: (positions,), standard error of that mean; 0 for one seed.
        rise, sharpness, eigenvalue: see ``SpaceResult``.
    """

    profile: list[float | None]
    band: list[float | None]
    difference: list[float | None] | None
    difference_band: list[float | None] | None
    rise: Summary
    sharpness: Summary
    eigenvalue: Summary


@dataclass(frozen=True)
class GroupResult:
    """Runs that differ by their seed only."""

    label: str
    runs: list[str]
    seeds: list[int | None]
    loss: Summary
    spaces: dict[str, GroupSpace]


@dataclass(frozen=True)
class LandscapeResult:
    """Everything that the report, the figures and the viewer show.

    Args:
        runs: labels of all runs.
        control: label of the group that the others are compared with.
        figures: PNG files beside ``landscape.json``.
    """

    runs: list[str]
    settings: Settings
    control: str
    groups: list[GroupResult]
    entries: list[RunResult]
    figures: list[str]
    provenance: dict[str, Any]


def numbers(values: Sequence[float | None]) -> list[float]:
    """Those that are known."""
    return [value for value in values if value is not None]
