"""Options and methods that were removed.

A command line or recipe that names one is refused with a message that says what to use instead.
Runs and checkpoints record all options. A removed option that had no effect on the run is ignored;
otherwise only a version that still has the option can resume the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import UserError

# Last commit, with its tag, that has the removed options and methods, except for those that name
# another version.
TAG = "fc2d1093 (tag last-with-fit)"


@dataclass(frozen=True)
class RemovedOption:
    """An option that was removed."""

    # What to use instead, in the imperative.
    instead: str
    # Recorded values with which this version trains the same weights. None means all values, since
    # only removed methods or features read the option.
    neutral_values: tuple[Any, ...] | None = (None, False)
    # Commit or tag of the last version with the option.
    version: str = TAG
    # Whether the option only affects held-out measurements, and so only runs that use them to
    # choose weights.
    is_of_measurement: bool = False
    # Whether only Bi-LoRA reads the option.
    is_of_bilora: bool = False

    def is_neutral(self, value: Any, depends_on_heldout: bool = True) -> bool:
        """Return whether this version trains a run with this recorded value in the same way.

        Args:
            value: the recorded value.
            depends_on_heldout: whether held-out measurements decide which weights the run exports.
        """
        if self.neutral_values is None or value in self.neutral_values:
            return True
        return self.is_of_measurement and not depends_on_heldout


_RIVALS_VERSION = "14fa1222^"
OPTIONS: dict[str, RemovedOption] = {
    "efm_beta": RemovedOption("use --method lora-sam", None, _RIVALS_VERSION),
    "efm_schedule": RemovedOption("use --method lora-sam", None, _RIVALS_VERSION),
    "looksam_k": RemovedOption("use --method lora-sam", None, _RIVALS_VERSION),
    "looksam_alpha": RemovedOption("use --method lora-sam", None, _RIVALS_VERSION),
    "auxiliaries": RemovedOption(
        "leave it out, since all samples use one auxiliary", (None, 1), is_of_bilora=True
    ),
    "auxiliary_snr_gamma": RemovedOption("leave it out, since it needs several auxiliaries", None),
    "auxiliary_direction": RemovedOption(
        "leave it out, since the auxiliary always ascends", ("ascent",), is_of_bilora=True
    ),
    "ball": RemovedOption(
        "leave it out, since one ball bounds all layers", ("global",), is_of_bilora=True
    ),
    "loss_rise": RemovedOption("give --rho a number, such as 0.05", None),
    "l2sp_lambda": RemovedOption("use --method lora", None),
    "use_ema": RemovedOption("use --keep_best"),
    "ema_decay": RemovedOption("use --keep_best", None),
    "fit": RemovedOption("use a recipe with --keep_best, or python -m eval.sweep"),
    # Options that only the search of --fit reads.
    "fit_space": RemovedOption("use python -m eval.sweep", None),
    "fit_budget": RemovedOption("use python -m eval.sweep", None),
    "fit_folds": RemovedOption("use --validation_dataset or --validation_file", None),
    "validation_part": RemovedOption(
        "use --max_eval_samples, or a separate held-out set", (None,), is_of_measurement=True
    ),
}
# Removed values of options that `TAG` has, and what to use instead, in the imperative.
VALUES: dict[tuple[str, str], str] = {("rho", "auto"): "give a number, such as 0.05"}
# Removed methods that `TAG` has, and what to use instead, in the imperative.
METHODS: dict[str, str] = {"lora-l2sp": "use --method lora"}


def refuse_option(name: str, spelling: str) -> None:
    """Raise UserError if an option was removed.

    Args:
        name: the option's name, with underscores and without leading dashes.
        spelling: the option in the message, such as "--fit".

    Raises:
        UserError: the option was removed. The message says what to use instead.
    """
    if name in OPTIONS:
        _refuse(spelling, OPTIONS[name].instead, OPTIONS[name].version)


def refuse_value(name: str, value: str) -> None:
    """Raise UserError if a value of an option was removed.

    Args:
        name: the option's name.
        value: the value as the user wrote it.

    Raises:
        UserError: the value was removed. The message says what to use instead.
    """
    if (name, value) in VALUES:
        _refuse(f"--{name} {value}", VALUES[name, value])


def refuse_method(name: str) -> None:
    """Raise UserError if a method was removed.

    Raises:
        UserError: the method was removed. The message says what to use instead.
    """
    if name in METHODS:
        _refuse(f"the method {name}", METHODS[name])


def _refuse(subject: str, instead: str, version: str = TAG) -> NoReturn:
    raise UserError(
        f"{subject} was removed: {instead}. The last version with it is {version} in git."
    )


def require_neutral(saved: Mapping[str, Any], depends_on_heldout: bool = True) -> None:
    """Check that recorded options include no removed option or method that affects training.

    Args:
        saved: options of a run or a checkpoint.
        depends_on_heldout: as in `RemovedOption.is_neutral`.

    Raises:
        UserError: the method, an option that has an effect on this run, or the value of an option
            was removed.
    """
    method = saved.get("method")
    versions: dict[str, str] = {}  # last version with each removed option that has an effect
    if method in METHODS:
        versions["method"] = TAG
    for name, option in OPTIONS.items():
        if option.is_of_bilora and method not in (None, "bilora"):
            continue
        if name in saved and not option.is_neutral(saved[name], depends_on_heldout):
            versions[name] = option.version
    for name, value in VALUES:
        if saved.get(name) == value:
            versions[name] = TAG
    for name, version in versions.items():
        raise UserError(
            f"it was trained with --{name} {saved[name]}, which was removed: resume it with"
            f" {version} in git, or start a new run in another folder."
        )
