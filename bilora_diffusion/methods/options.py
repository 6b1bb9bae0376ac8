"""What the methods can be told, checked in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..choices import AUXILIARY_UPDATES, BALLS, DIRECTIONS, RHO_NORMS, SCHEDULES
from ..errors import UserError, did_you_mean

_CHOICES = {
    "rho_norm": RHO_NORMS,
    "ball": BALLS,
    "auxiliary_direction": DIRECTIONS,
    "rho_schedule": SCHEDULES,
    "auxiliary_update": AUXILIARY_UPDATES,
    "bar_schedule": SCHEDULES,
}


@dataclass(frozen=True)
class MethodOptions:
    """What the methods can be told; each reads its own part (`Method.reads`).

    Args:
        rho: radius: of the ball that bounds the auxiliary (Eq. 8), of LoRA-SAM's step (Eq. 4),
            or of Flat-LoRA's noise; None is the method's own default.
        rho_norm: "scaled" measures s * B2 @ A2, the change of the weights; "unscaled" the literal
            B2 @ A2.
        rho_schedule: course of Bi-LoRA's rho: "constant" (the paper), or rising from 0 to rho over
            the run, "linear" or "cosine" (as Flat-LoRA raises its noise).
        ball: what Eq. 10 clips: the norm over all layers ("global", the paper), that of each layer
            to its share rho / sqrt(layers) ("per-layer"), or nothing ("none").
        auxiliary_rank: rank of the auxiliary; None is the primary's.
        auxiliary_alpha: alpha of the auxiliary; None is the primary's.
        auxiliary_learning_rate: learning rate of the auxiliary; None is the primary's.
        auxiliary_direction: "ascent" (Eq. 9) or "descent", which makes it a second primary that is
            thrown away: the control that shows what the ascent does.
        auxiliary_update: "optimizer" (Eq. 9) or "power", a step of block power iteration.
        rescale_moments: at each projection shrink Adam's moments of the auxiliary with it.
        bar_alpha: strength of BAR's balancing.
        bar_schedule: course of `bar_alpha`: constant, or falling to 0 "linear" or "cosine".
        num_steps: optimizer steps of the whole run, which schedules need.
        seed: of the random numbers that a method itself draws (Flat-LoRA's noise).

    Raises:
        UserError: a value outside its range.
    """

    rho: float | None = None
    rho_norm: str = "scaled"
    auxiliary_rank: int | None = None
    auxiliary_alpha: float | None = None
    auxiliary_learning_rate: float | None = None
    rho_schedule: str = "constant"
    ball: str = "global"
    auxiliary_direction: str = "ascent"
    auxiliary_update: str = "optimizer"
    rescale_moments: bool = False
    bar_alpha: float = 0.25
    bar_schedule: str = "constant"
    num_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rho is not None and not self.rho > 0:
            raise UserError(f"rho is {self.rho}; use a number above 0, such as 0.05.")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                hint = did_you_mean(value, choices)
                raise UserError(f'{name} is "{value}"{hint}; use one of {", ".join(choices)}.')
        if self.auxiliary_rank is not None and self.auxiliary_rank < 1:
            raise UserError(
                f"auxiliary_rank is {self.auxiliary_rank}; use a whole number of 1 or more, "
                "or leave it out for the primary's rank."
            )
        if self.auxiliary_alpha is not None and not self.auxiliary_alpha > 0:
            raise UserError(f"auxiliary_alpha is {self.auxiliary_alpha}; use a number above 0.")
        rate = self.auxiliary_learning_rate
        if rate is not None and not rate >= 0:
            raise UserError(f"auxiliary_learning_rate is {rate}; use 0 or more.")
        if not self.bar_alpha >= 0:
            raise UserError(f"bar_alpha is {self.bar_alpha}; use 0 or more, such as 0.25.")

    def progress(self, step: int) -> float:
        """`step` as a share of the whole run, in (0, 1] for steps 1, 2, ... num_steps.

        Raises:
            UserError: num_steps is not known.
        """
        if self.num_steps is None:
            raise UserError(
                "A schedule needs the length of the run; give num_steps, the optimizer steps in "
                "all."
            )
        return min(1.0, step / self.num_steps)


def rising(schedule: str, progress: float) -> float:
    """A factor that starts at 0 and ends at 1: linear, or (1 - cos(pi t)) / 2; or always 1."""
    if schedule == "constant":
        return 1.0
    return progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2


def falling(schedule: str, progress: float) -> float:
    """A factor that starts at 1 and ends at 0, in the same forms; or always 1."""
    return 1.0 if schedule == "constant" else 1 - rising(schedule, progress)
