"""Defaults and rates that depend on other options, on the method or on the machine.

A rule is a function that computes an option's value from the configuration, in which earlier rules
have already set their options. Some rules are next to the option's declaration; `image.derived` and
`text.config` have the rules for most options of one script.

This module handles every learning rate of a run, from its default to the optimizer's value:

    --learning_rate            -> the primary of the denoiser or language model. Default: 2e-4 for
                                  images, 5e-4 for text, 1 with Prodigy
    --text_encoder_lr          -> the primaries of trained text encoders. Default: 5e-6; with
                                  Prodigy always --learning_rate
    --auxiliary_learning_rate  -> the auxiliary of the denoiser or language model. Default: each
                                  auxiliary has its primary's rate. If a value is given, a text
                                  encoder's auxiliary gets text_encoder_lr * value / learning_rate.
                                  With Prodigy, a value other than --learning_rate is refused
    --scale_lr                 -> multiplies the rates by the samples per step; the rates of text
                                  encoders only with Prodigy

`Method.param_groups` puts these rates into the optimizer's parameter groups (`auxiliary_rate` in
methods/bilora/algorithm.py keeps the ratio), and the schedule multiplies all of them by one factor.
Prodigy (arXiv 2306.06101) estimates one step size for all parameters and multiplies it by the
learning rate, so with Prodigy all rates are ``--learning_rate``. The rates are computed here and
not in `train.optimizers`, so that run.json records the rates in use. In your own training loop, the
auxiliary's rate is `BiLoRAConfig.auxiliary_learning_rate`; if that is None, it is the ``lr`` that
you pass to `BiLoRA.param_groups`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from .. import methods
from ..methods.options import default_lora_alpha
from .options import default_mixed_precision, default_report_to
from .run import RunConfig

# The default of diffusers' scripts.
TEXT_ENCODER_RATE = 5e-6
# Learning rate at which Prodigy uses its estimated step size unchanged.
PRODIGY_RATE = 1.0
# With Prodigy, a rate up to this one was probably meant for another optimizer.
LOW_PRODIGY_RATE = 0.1
# AdamW changes each weight by about the learning rate per step. From this rate on, adapters do not
# learn anything.
HIGH_ADAMW_RATE = 0.1
Config = TypeVar("Config", bound=RunConfig)
# An option, and the function that derives its value if the user did not give one.
Rule = tuple[str, Callable[[Config], object]]


def default_rho(cfg: RunConfig) -> float | None:
    """Return the method's default radius; None for a method without one."""
    return methods.get(cfg.method).usual_rho(cfg.modality)


def default_learning_rate(cfg: RunConfig) -> float:
    """Return 1 for Prodigy, else the script's declared default (Tables A4 to A8)."""
    if cfg.optimizer == "prodigy":
        return PRODIGY_RATE
    return cfg.learning_rate


def default_text_encoder_lr(cfg: RunConfig) -> float | None:
    """Return diffusers' default, or Prodigy's learning rate; None for frozen text encoders."""
    if not cfg.train_text_encoder:
        return None
    if cfg.optimizer == "prodigy":
        return cfg.learning_rate
    return TEXT_ENCODER_RATE


def text_encoder_rate(cfg: RunConfig) -> float:
    """Return the learning rate of trained text encoders."""
    # Prodigy estimates one step size for all models together.
    if cfg.optimizer == "prodigy" or cfg.text_encoder_lr is None:
        return cfg.learning_rate
    return cfg.text_encoder_lr


def with_scaled_rates(cfg: Config, processes: int) -> Config:
    """Return the configuration with the learning rates that ``--scale_lr`` gives.

    The option multiplies the rates by the samples per step. The auxiliary's rate keeps its ratio to
    the primary's. As in diffusers' scripts, the rate of text encoders is not scaled, except with
    Prodigy, which needs equal rates.
    """
    if not cfg.scale_lr:
        return cfg
    # Samples per optimizer step over all processes, as diffusers' scripts count them.
    samples = cfg.gradient_accumulation_steps * cfg.train_batch_size * processes
    cfg = replace(cfg, learning_rate=cfg.learning_rate * samples)
    if cfg.auxiliary_learning_rate is not None:
        # None means the primary's rate, which has been scaled above.
        cfg = replace(cfg, auxiliary_learning_rate=cfg.auxiliary_learning_rate * samples)
    if cfg.optimizer == "prodigy" and cfg.text_encoder_lr is not None:
        cfg = replace(cfg, text_encoder_lr=cfg.learning_rate)
    return cfg


def default_validation_loss_steps(cfg: RunConfig) -> int:
    """Return the steps between held-out measurements that choose the exported weights.

    If no measurement chooses them, or if the length of the run is given in epochs, return the
    declared default.
    """
    if cfg.depends_on_heldout and cfg.max_train_steps:
        return cfg.measurement_interval(cfg.max_train_steps)
    return cfg.validation_loss_steps


DERIVED_DEFAULTS: tuple[Rule[RunConfig], ...] = (  # in order: a rule may read earlier results
    ("lora_alpha", default_lora_alpha),  # from the rank
    ("rho", default_rho),  # from the method
    ("learning_rate", default_learning_rate),  # from the optimizer
    ("mixed_precision", default_mixed_precision),
    ("report_to", default_report_to),
)


def derive(cfg: Config, rules: Sequence[Rule[Config]]) -> Config:
    """Return the configuration after applying the rules, in order, to options not given."""
    for option, default in rules:
        if option not in cfg.given_options:
            cfg = replace(cfg, **{option: default(cfg)})
    return cfg
