"""Options and methods that earlier versions had.

Command lines and recipes that name one are refused with a sentence that says what to use. Runs and
checkpoints record all options: one that had no effect there is ignored, otherwise the run can only
be resumed by the version that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import UserError

# The last commit that has all of them, with its tag.
TAG = "fc2d1093 (tag last-with-fit)"


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
    # Whether it only says what is measured: it has an effect only on runs that choose by it
    is_of_measurement: bool = False
    # Whether only Bi-LoRA read it
    is_of_bilora: bool = False

    def is_neutral(self, value: Any, depends_on_heldout: bool = True) -> bool:
        """Test that a run with this recorded value is trained the same by this version.

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
        "leave it out, all samples see one auxiliary", (None, 1), is_of_bilora=True
    ),
    "auxiliary_snr_gamma": RemovedOption("leave it out, it needs several auxiliaries", None),
    "auxiliary_direction": RemovedOption(
        "leave it out, the auxiliary ascends", ("ascent",), is_of_bilora=True
    ),
    "ball": RemovedOption(
        "leave it out, one ball bounds all layers", ("global",), is_of_bilora=True
    ),
    "loss_rise": RemovedOption("give --rho a number, such as 0.05", None),
    "l2sp_lambda": RemovedOption("use --method lora", None),
    "use_ema": RemovedOption("use --keep_best"),
    "ema_decay": RemovedOption("use --keep_best", None),
    "fit": RemovedOption("use a recipe with --keep_best, or python -m eval.sweep"),
    # Read by the search of --fit only
    "fit_space": RemovedOption("use python -m eval.sweep", None),
    "fit_budget": RemovedOption("use python -m eval.sweep", None),
    "fit_folds": RemovedOption("use --validation_dataset or --validation_file", None),
    "validation_part": RemovedOption(
        "use --max_eval_samples, or a held-out set of its own", (None,), is_of_measurement=True
    ),
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
        _refuse(spelling, OPTIONS[name].instead, OPTIONS[name].version)


def refuse_value(name: str, value: str) -> None:
    """Refuse a value of an option that was removed.

    Args:
        name: of the option.
        value: as the user wrote it.

    Raises:
        UserError: it was removed. The sentence says what to use.
    """
    if (name, value) in VALUES:
        _refuse(f"--{name} {value}", VALUES[name, value])


def refuse_method(name: str) -> None:
    """Refuse a method that was removed.

    Raises:
        UserError: it was removed. The sentence says what to use.
    """
    if name in METHODS:
        _refuse(f"the method {name}", METHODS[name])


def _refuse(subject: str, instead: str, version: str = TAG) -> NoReturn:
    raise UserError(
        f"{subject} was removed: {instead}. The last version with it is {version} in git."
    )


def require_neutral(saved: Mapping[str, Any], depends_on_heldout: bool = True) -> None:
    """Refuse recorded options that change the training and that this version does not have.

    Args:
        saved: options of a run or a checkpoint.
        depends_on_heldout: as for `RemovedOption.is_neutral`.

    Raises:
        UserError: one of them was removed, and has an effect, or the method was removed.
    """
    method = saved.get("method")
    versions: dict[str, str] = {}  # of each option that has an effect
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
