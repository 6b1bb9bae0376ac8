"""What is refused before anything is downloaded or loaded, each with the reason and the fix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..errors import UserError, did_you_mean
from . import combinations
from .environment import check_environment
from .notes import remarks, said, set_aside

Check = Callable[[dict[str, Any], frozenset[str]], None]
OPTIMIZERS = ("adamw", "prodigy")

AT_LEAST_ONE = (
    "rank",
    "auxiliary_rank",
    "lora_ga_samples",
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "num_train_epochs",
    "repeats",
    "num_class_images",
    "sample_batch_size",
    "validation_epochs",
    "checkpointing_steps",
    "lr_num_cycles",
    "dynamics_steps",
    "max_length",
    "max_target_length",
    "max_train_samples",
    "max_eval_samples",
    "preprocessing_num_workers",
    "eval_batch_size",
    "generation_max_new_tokens",
)
AT_LEAST_ZERO = (
    "checkpoints_total_limit",
    "max_predictions",
    "eval_train_samples",
    "seed",
    "num_validation_images",
    "validation_loss_steps",
    "lr_warmup_steps",
    "dataloader_num_workers",
    "prior_loss_weight",
    "bar_alpha",
    "adam_weight_decay",
    "adam_weight_decay_text_encoder",
)
ABOVE_ZERO = (
    "lora_alpha",
    "auxiliary_alpha",
    "rho",
    "learning_rate",
    "text_encoder_lr",
    "auxiliary_learning_rate",
    "snr_gamma",
    "max_grad_norm",
    "lr_power",
    "adam_epsilon",
)
BELOW_ONE = (
    "lora_dropout",
    "ema_decay",
    "warmup_ratio",
    "adam_beta1",
    "adam_beta2",
    "prodigy_beta3",
)


def check(
    values: dict[str, Any],
    given: frozenset[str],
    defaults: dict[str, Any],
    *,
    inputs: Check,
    locations: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Refuse what can't be honoured, and set aside what has no effect.

    Args:
        values: every option, completed by ``resolve``.
        given: names of the options that the user gave.
        defaults: every option as it is when not given.
        inputs: a script's own check of what it is given to train on.
        locations: its own check of the folders and ids that are named.

    Returns:
        The values that hold, and what is to be said about them.

    Raises:
        UserError: one sentence with the value and the fix.
    """
    _check_names(values)
    _check_ranges(values)
    values, notes = set_aside(values, given, defaults)
    notes += remarks(values, given)
    inputs(values, given)
    combinations.check(values)
    _check_training(values)
    if locations is not None:
        locations(values)
    check_environment(values)
    return values, notes


def _check_names(values: dict[str, Any]) -> None:
    from ..methods import names

    for name, choices in (("method", names()), ("optimizer", OPTIMIZERS)):
        if values[name] not in choices:
            hint = did_you_mean(values[name], choices)
            raise UserError(f'--{name} is "{values[name]}"{hint}: use one of {", ".join(choices)}.')


def _check_ranges(values: dict[str, Any]) -> None:
    rules: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
        (AT_LEAST_ONE, lambda x: x >= 1, "give 1 or more"),
        (AT_LEAST_ZERO, lambda x: x >= 0, "give 0 or more"),
        (ABOVE_ZERO, lambda x: x > 0, "give a number above 0"),
        (BELOW_ONE, lambda x: 0 <= x < 1, "give a number from 0 up to, but not including, 1"),
    )
    for names, holds, fix in rules:
        for name in names:
            value = values.get(name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                plain = "; for plain LoRA use --method lora" if name == "rho" else ""
                raise UserError(f"--{name} is {value}: {fix}{plain}.")


def _check_training(values: dict[str, Any]) -> None:
    rate = values["auxiliary_learning_rate"]
    if values["optimizer"] == "prodigy" and rate not in (None, values["learning_rate"]):
        raise UserError(
            f"{said('auxiliary_learning_rate', values)} differs from --learning_rate"
            f" {values['learning_rate']}, and prodigy has one rate for all: drop it."
        )
    if not values["output_dir"]:
        raise UserError('--output_dir is "": name the folder of the run.')
    if values["overwrite_output_dir"] and values["resume_from_checkpoint"]:
        raise UserError(
            f"{said('resume_from_checkpoint', values)} continues what --overwrite_output_dir"
            " deletes: drop one."
        )
