"""Defaults and rates that depend on other options, on the method or on the machine.

A rule is a function from the configuration, as far as it is derived, to the option's value. Some
are next to the option's declaration. `image.derived` and `text.config` have the rules of most of
their own options.

Every learning rate of a run, from its default to what the optimizer gets, is here:

    --learning_rate            -> the primary of the denoiser or language model. Default: 2e-4 for
                                  images, 5e-4 for text, 1 with Prodigy
    --text_encoder_lr          -> the primaries of trained text encoders. Default: 5e-6; with
                                  Prodigy always --learning_rate
    --auxiliary_learning_rate  -> the auxiliary of the denoiser or language model. Those of text
                                  encoders keep the ratio of the primaries. Default: of each
                                  model the primary's; another value is refused with Prodigy
    --scale_lr                 -> multiplies the rates by the samples of a step, those of text
                                  encoders with Prodigy only

`Method.param_groups` makes the optimizer's groups of them (`auxiliary_rate` in
methods/bilora/algorithm.py keeps the ratio), and the schedule multiplies all of them alike. Prodigy
(arXiv 2306.06101) estimates one step size for all parameters and takes the learning rate as a
factor on it, so that under it all rates are ``--learning_rate``. The rates are with the options and
not with the optimizers, since a run records the rates that it trains with.
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
# With this factor Prodigy's step size is the estimated one.
PRODIGY_RATE = 1.0
# A rate up to this was probably meant for another optimizer than Prodigy.
LOW_PRODIGY_RATE = 0.1
# AdamW moves each weight by about the rate in a step. From this rate on it trains no adapter.
HIGH_ADAMW_RATE = 0.1
Config = TypeVar("Config", bound=RunConfig)
# An option, and the function that derives its value where nobody gave one.
Rule = tuple[str, Callable[[Config], object]]


def default_rho(cfg: RunConfig) -> float | None:
    """The method's own radius; None for a method without one."""
    return methods.get(cfg.method).usual_rho(cfg.modality)


def default_learning_rate(cfg: RunConfig) -> float:
    """1 for Prodigy, else the script's declared default (Tables A4 to A8)."""
    if cfg.optimizer == "prodigy":
        return PRODIGY_RATE
    return cfg.learning_rate


def default_text_encoder_lr(cfg: RunConfig) -> float | None:
    """diffusers' default, and for Prodigy the learning rate; None for frozen text encoders."""
    if not cfg.train_text_encoder:
        return None
    if cfg.optimizer == "prodigy":
        return cfg.learning_rate
    return TEXT_ENCODER_RATE


def text_encoder_rate(cfg: RunConfig) -> float:
    """The rate with which text encoders are trained."""
    # Prodigy's one step size is estimated for all models together.
    if cfg.optimizer == "prodigy" or cfg.text_encoder_lr is None:
        return cfg.learning_rate
    return cfg.text_encoder_lr


def with_scaled_rates(cfg: Config, processes: int) -> Config:
    """The configuration with the rates of ``--scale_lr``, times the samples of a step.

    The auxiliary's rate keeps its ratio to the primary's. That of text encoders is not scaled, as
    in diffusers' scripts, except for Prodigy, under which all rates are the same.
    """
    if not cfg.scale_lr:
        return cfg
    # Samples of one optimizer step over all processes, as diffusers' scripts count them.
    samples = cfg.gradient_accumulation_steps * cfg.train_batch_size * processes
    cfg = replace(cfg, learning_rate=cfg.learning_rate * samples)
    if cfg.auxiliary_learning_rate is not None:
        # None is the primary's rate, which is scaled already.
        cfg = replace(cfg, auxiliary_learning_rate=cfg.auxiliary_learning_rate * samples)
    if cfg.optimizer == "prodigy" and cfg.text_encoder_lr is not None:
        cfg = replace(cfg, text_encoder_lr=cfg.learning_rate)
    return cfg


def default_validation_loss_steps(cfg: RunConfig) -> int:
    """Steps between measurements where held-out samples decide what is exported; else none."""
    if cfg.depends_on_heldout and cfg.max_train_steps:
        return cfg.measurement_interval(cfg.max_train_steps)
    return cfg.validation_loss_steps


DERIVED_DEFAULTS: tuple[Rule[RunConfig], ...] = (  # in this order: each may read those above it
    ("lora_alpha", default_lora_alpha),  # from the rank
    ("rho", default_rho),  # from the method
    ("learning_rate", default_learning_rate),  # from the optimizer
    ("mixed_precision", default_mixed_precision),
    ("report_to", default_report_to),
)


def derive(cfg: Config, rules: Sequence[Rule[Config]]) -> Config:
    """Fill in by rules, in their order, the options that nobody gave."""
    for option, default in rules:
        if option not in cfg.given_options:
            cfg = replace(cfg, **{option: default(cfg)})
    return cfg
