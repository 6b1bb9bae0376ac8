"""Options and methods that earlier versions had.

Command lines and recipes that name one are refused with a sentence that says what to use. Runs and
checkpoints record all options: one that had no effect there is ignored, otherwise the run can only
be resumed by the version that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UserError

# Tag of the last commit that has all of them.
TAG = "last-with-fit"


@dataclass(frozen=True)
class RemovedOption:
    """An option that was removed."""

    # What to use in its place, in the imperative
    instead: str
    # Recorded values under which this version trains the same; None: under every value, since only
    # removed methods read the option
    neutral_values: tuple[Any, ...] | None = (None, False)
    # Tag or commit of the last version with the option
    version: str = TAG

    def is_neutral(self, value: Any) -> bool:
        """Test that a run with this recorded value is trained the same by this version."""
        return self.neutral_values is None or value in self.neutral_values


_RIVALS_VERSION = "14fa1222^"
OPTIONS: dict[str, RemovedOption] = {
    "efm_beta": RemovedOption("use --method lora-sam", None, _RIVALS_VERSION),
    "efm_schedule": RemovedOption("use --method lora-sam", None, _RIVALS_VERSION),
    "looksam_k": RemovedOption("use --method lora-sam", None, _RIVALS_VERSION),
    "looksam_alpha": RemovedOption("use --method lora-sam", None, _RIVALS_VERSION),
    "auxiliaries": RemovedOption("leave it out, all samples see one auxiliary", (None, 1)),
    "auxiliary_snr_gamma": RemovedOption("leave it out, it needs several auxiliaries", None),
    "auxiliary_direction": RemovedOption("leave it out, the auxiliary ascends", ("ascent",)),
    "ball": RemovedOption("leave it out, one ball bounds all layers", ("global",)),
    "loss_rise": RemovedOption("give --rho a number, such as 0.05", None),
    "l2sp_lambda": RemovedOption("use --method lora", None),
    "use_ema": RemovedOption("use --keep_best"),
    "ema_decay": RemovedOption("use --keep_best", None),
}
# Values of options of `TAG`, and what to use in their place, in the imperative.
VALUES: dict[tuple[str, str], str] = {("rho", "auto"): "give a number, such as 0.05"}
# What to use in place of a method of `TAG`, in the imperative.
METHODS: dict[str, str] = {"lora-l2sp": "use --method lora"}


def refuse_option(name: str, spelling: str) -> None:
    """Refuse an option that was removed.

    Args:
        name: of the option, with underscores and without dashes.
        spelling: as the user wrote it.

    Raises:
        UserError: it was removed. The sentence says what to use.
    """
    if name in OPTIONS:
        option = OPTIONS[name]
        raise UserError(
            f"{spelling} was removed: {option.instead}. The last version with it is"
            f" {option.version} in git."
        )


def refuse_value(name: str, value: str) -> None:
    """Refuse a value of an option that was removed.

    Args:
        name: of the option.
        value: as the user wrote it.

    Raises:
        UserError: it was removed. The sentence says what to use.
    """
    if (name, value) in VALUES:
        raise UserError(
            f"--{name} {value} was removed: {VALUES[name, value]}. The last version with it is"
            f" {TAG} in git."
        )


def refuse_method(name: str) -> None:
    """Refuse a method that was removed.

    Raises:
        UserError: it was removed. The sentence says what to use.
    """
    if name in METHODS:
        raise UserError(
            f"the method {name} was removed: {METHODS[name]}. The last version with it is {TAG} in"
            " git."
        )


def require_neutral(saved: Mapping[str, Any]) -> None:
    """Refuse recorded options that change the training and that this version does not have.

    Args:
        saved: options of a run or a checkpoint.

    Raises:
        UserError: one of them was removed, and has an effect.
    """
    versions: dict[str, str] = {}  # of each option that has an effect
    for name, option in OPTIONS.items():
        if name in saved and not option.is_neutral(saved[name]):
            versions[name] = option.version
    for name, value in VALUES:
        if saved.get(name) == value:
            versions[name] = TAG
    for name, version in versions.items():
        raise UserError(
            f"it was trained with --{name} {saved[name]}, which was removed: resume it with"
            f" {version} in git, or start a new run in another folder."
        )
