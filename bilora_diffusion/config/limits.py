"""The largest value that each number may have, and why: a typing error is to end in a sentence, not
in a wait or in a full memory.

The bounds are far above what any run needs. What is too small is refused by ``checks``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

from ..errors import UserError


class Limit(NamedTuple):
    """The largest value, and the reason as the end of a sentence."""

    most: int | float
    reason: str


_RANK = Limit(16_384, "a rank above a layer's smaller side adds nothing, and no model has a wider")
_SCALE = Limit(1e6, "the adapter's output is scaled by alpha / rank, and half precision ends there")
_RATE = Limit(1e4, "one step would be larger than any weight")
_BATCH = Limit(65_536, "no device holds a larger batch")
_STEPS = Limit(10**9, "at ten steps a second that many take three years")
_ROWS = Limit(10**9, "no data set here has more")
_FACTOR = Limit(1e6, "what it weighs would drown everything else")
_DECAY = Limit(1e4, "one step would take away more than the whole weight")
_SHARE = Limit(1.0, "it is a share")
_WORKERS = Limit(1024, "each is a process of its own")
_TOKENS = Limit(10**7, "no model reads longer texts")

LIMITS = {
    # adapters and methods
    "rank": _RANK,
    "auxiliary_rank": _RANK,
    "lora_alpha": _SCALE,
    "auxiliary_alpha": _SCALE,
    "lora_dropout": _SHARE,
    "lora_ga_samples": Limit(10**6, "each is a backward pass before the first step"),
    "ema_decay": _SHARE,
    "rho": Limit(1e6, "no change of the weights is so large, so it would bound nothing"),
    "bar_alpha": _FACTOR,
    # steps
    "seed": Limit(2**63 - 1, "random generators take 64 bits"),
    "train_batch_size": _BATCH,
    "gradient_accumulation_steps": Limit(65_536, "one step would take so many forward passes"),
    "max_train_steps": _STEPS,
    "num_train_epochs": Limit(10**6, "no run sees its data more often"),
    "max_grad_norm": Limit(1e30, "norms in 32 bits end there; it clips nothing far below already"),
    "local_rank": Limit(10**6, "launchers count processes from 0"),
    # optimizer
    "learning_rate": _RATE,
    "text_encoder_lr": _RATE,
    "auxiliary_learning_rate": _RATE,
    "lr_warmup_steps": _STEPS,
    "warmup_ratio": _SHARE,
    "lr_num_cycles": _STEPS,
    "lr_power": Limit(100, "the rate would fall to 0 within the first steps"),
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": Limit(1e3, "the optimizer would hardly move anything"),
    "adam_weight_decay": _DECAY,
    "adam_weight_decay_text_encoder": _DECAY,
    "prodigy_beta3": _SHARE,
    # images
    "repeats": Limit(10_000, "the order of a whole epoch is drawn at once; use more epochs"),
    "resolution": Limit(8192, "a larger image alone takes the autoencoder over 34 GB a layer"),
    "dataloader_num_workers": _WORKERS,
    "num_class_images": Limit(100_000, "each lacking one is generated, in a second or more"),
    "prior_loss_weight": _FACTOR,
    "sample_batch_size": _BATCH,
    "snr_gamma": Limit(1e6, "no signal-to-noise ratio of a schedule is higher"),
    # text
    "max_length": _TOKENS,
    "max_target_length": _TOKENS,
    "generation_max_new_tokens": _TOKENS,
    "max_train_samples": _ROWS,
    "max_eval_samples": _ROWS,
    "eval_train_samples": _ROWS,
    "max_predictions": _ROWS,
    "preprocessing_num_workers": _WORKERS,
    "eval_batch_size": _BATCH,
    # the run
    "num_validation_images": Limit(10_000, "so many of each prompt are generated, one by one"),
    "validation_epochs": _STEPS,
    "validation_loss_steps": _STEPS,
    "checkpointing_steps": _STEPS,
    "checkpoints_total_limit": _STEPS,
    "dynamics_steps": _STEPS,
}
SAMPLES_OF_A_STEP = 10**6
SMALLEST = 1.2e-38
"""Of 32-bit numbers; what is smaller counts as 0 in the arithmetic."""


def check(values: Mapping[str, Any]) -> None:
    """Refuse numbers that no run can mean.

    Args:
        values: options by name; those that are no numbers are passed over.

    Raises:
        UserError: one sentence with the value, the bound and its reason.
    """
    for name in LIMITS.keys() & values.keys():
        check_one(name, values[name], f"--{name}")
    batch, passes = (
        values.get(n) or 1 for n in ("train_batch_size", "gradient_accumulation_steps")
    )
    if batch * passes > SAMPLES_OF_A_STEP:
        raise UserError(
            f"--train_batch_size {batch} times --gradient_accumulation_steps {passes} is over"
            f" {SAMPLES_OF_A_STEP} samples a step: give smaller ones."
        )


def check_one(name: str, value: Any, shown: str) -> None:
    """Refuse one number beyond its bound.

    Args:
        name: a key of ``LIMITS``.
        value: the number; None is no value.
        shown: the name as the user wrote it.

    Raises:
        UserError: one sentence with the value, the bound and its reason.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{shown} is {value!r:.80}: give a number.")
    number: Any = value
    most, reason = LIMITS[name]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{shown} is {value}: give a finite number.")
    if abs(number) > most:
        long = isinstance(number, int) and abs(number) >= 10**30
        text = f"a number of {len(str(abs(number)))} digits" if long else value
        fix = f"at most {most}, since {reason}" if number > 0 else "0 or more"
        raise UserError(f"{shown} is {text}: give {fix}.")
    if 0 < abs(number) < SMALLEST:
        raise UserError(
            f"{shown} is {value}, which is 0 in 32-bit arithmetic: give a larger number, or 0."
        )
