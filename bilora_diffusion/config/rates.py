"""Every learning rate of a run, from its default to what the optimizer gets.

    --learning_rate            -> the primaries of all models, the text encoders' excepted
    --auxiliary_learning_rate  -> the auxiliary (`methods.bilora.options` has its default)
    --text_encoder_lr          -> the primaries of trained text encoders

Prodigy (arXiv 2306.06101) estimates one step size for all parameters and takes the learning rate
as a factor on it, so that under it all rates are ``--learning_rate``. This lies beside the options
and not beside the optimizers, since a run records the rates that it trains with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from .run import RunConfig

TEXT_ENCODER_RATE = 5e-6
PRODIGY_RATE = 1.0
"""Prodigy's step size as it estimates it."""
LOW_PRODIGY_RATE = 0.1
"""Up to here a rate was probably meant for another optimizer."""
HIGH_ADAMW_RATE = 0.1
"""From here on AdamW, which moves each weight by about the rate in a step, trains no adapter."""
Config = TypeVar("Config", bound=RunConfig)


def default_learning_rate(cfg: RunConfig) -> float:
    """1 for Prodigy, else the script's own default (Tables A4 to A8)."""
    return PRODIGY_RATE if cfg.optimizer == "prodigy" else cfg.learning_rate


def default_text_encoder_lr(cfg: RunConfig) -> float | None:
    """diffusers' default, and for Prodigy the learning rate; None for frozen text encoders."""
    if not cfg.train_text_encoder:
        return None
    return cfg.learning_rate if cfg.optimizer == "prodigy" else TEXT_ENCODER_RATE


def text_encoder_rate(cfg: RunConfig) -> float:
    """The rate with which text encoders are trained."""
    # Prodigy's one step size is estimated for all models together.
    if cfg.optimizer == "prodigy" or cfg.text_encoder_lr is None:
        return cfg.learning_rate
    return cfg.text_encoder_lr


def with_scaled_rates(cfg: Config, processes: int) -> Config:
    """The configuration with the rates that ``--scale_lr`` asks for: times the samples of a step.

    The auxiliary's rate keeps its ratio to the primary's; that of text encoders stays, as in
    diffusers' scripts.
    """
    if not cfg.scale_lr:
        return cfg
    # Samples of one optimizer step over all processes, as diffusers' scripts count them.
    samples = cfg.gradient_accumulation_steps * cfg.train_batch_size * processes
    cfg = replace(cfg, learning_rate=cfg.learning_rate * samples)
    if cfg.auxiliary_learning_rate is not None:
        # None is the primary's rate, which is scaled already.
        cfg = replace(cfg, auxiliary_learning_rate=cfg.auxiliary_learning_rate * samples)
    return cfg
