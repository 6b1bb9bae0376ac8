"""What is refused before anything is downloaded or loaded, each with the reason and the fix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import combinations
from ..errors import UserError, did_you_mean
from .environment import check_environment

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
    "checkpoints_total_limit",
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

PRIOR = ("with_prior_preservation", True, "add --with_prior_preservation or drop it")
PRODIGY = ("optimizer", "prodigy", "add --optimizer prodigy or drop it")
ENCODERS = ("train_text_encoder", True, "add --train_text_encoder or drop it")
PUSH = ("push_to_hub", True, "add --push_to_hub or drop it")

NEEDS = {
    "class_data_dir": PRIOR,
    "class_prompt": PRIOR,
    "num_class_images": PRIOR,
    "prior_loss_weight": PRIOR,
    "prior_generation_precision": PRIOR,
    "prodigy_beta3": PRODIGY,
    "prodigy_decouple": PRODIGY,
    "prodigy_use_bias_correction": PRODIGY,
    "prodigy_safeguard_warmup": PRODIGY,
    "text_encoder_lr": ENCODERS,
    "adam_weight_decay_text_encoder": ENCODERS,
    "hub_token": PUSH,
    "hub_model_id": PUSH,
    "dynamics_steps": ("log_dynamics", True, "add --log_dynamics or drop it"),
    "ema_decay": ("use_ema", True, "add --use_ema or drop it"),
    "lora_ga_samples": (
        "init_lora_weights",
        "lora-ga",
        "use --init_lora_weights lora-ga or drop it",
    ),
    "use_8bit_adam": ("optimizer", "adamw", "use --optimizer AdamW or drop --use_8bit_adam"),
    "lr_num_cycles": (
        "lr_scheduler",
        "cosine_with_restarts",
        "use --lr_scheduler cosine_with_restarts or drop it",
    ),
    "lr_power": ("lr_scheduler", "polynomial", "use --lr_scheduler polynomial or drop it"),
}
"""Options without effect unless another has a certain value: they are refused, not ignored."""


def check(
    values: dict[str, Any],
    given: frozenset[str],
    defaults: dict[str, Any],
    *,
    inputs: Check,
    results: Check,
) -> None:
    """Refuse what can't be honoured.

    Args:
        values: every option, completed by ``resolve``.
        given: names of the options that the user gave.
        defaults: every option as it is when not given.
        inputs: a script's own check of what it is given to train on.
        results: its own check of validation and locations.

    Raises:
        UserError: one sentence with the value and the fix.
    """
    _check_names(values)
    _check_ranges(values)
    inputs(values, given)
    for name, (other, wanted, fix) in NEEDS.items():
        changed = name in given and values[name] != defaults[name]
        if changed and values[other] != wanted:
            raise UserError(f"{said(name, values)} has no effect here: {fix}.")
    combinations.check(values)
    _check_training(values)
    results(values, given)
    check_environment(values)


def said(name: str, values: dict[str, Any]) -> str:
    """The option as the user wrote it, without a secret."""
    value = values[name]
    if value is True or name == "hub_token":
        return f"--{name}"
    return f'--{name} "{value}"' if isinstance(value, str) else f"--{name} {value}"


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
    if values["lr_warmup_steps"] and values["lr_scheduler"] == "constant":
        raise UserError(
            f"{said('lr_warmup_steps', values)} has no effect on a constant learning rate: use"
            " --lr_scheduler constant_with_warmup or drop it."
        )
    if values["optimizer"] == "prodigy":
        for name in ("text_encoder_lr", "auxiliary_learning_rate"):
            if values.get(name) not in (None, values["learning_rate"]):
                raise UserError(
                    f"{said(name, values)} differs from --learning_rate"
                    f" {values['learning_rate']}, and prodigy has one rate for all: drop it."
                )
    if not values["output_dir"]:
        raise UserError('--output_dir is "": name the folder of the run.')
    if values["overwrite_output_dir"] and values["resume_from_checkpoint"]:
        raise UserError(
            f"{said('resume_from_checkpoint', values)} continues what --overwrite_output_dir"
            " deletes: drop one."
        )
