"""Defaults that depend on other options, on the method or on the machine, in one order.

A rule is a function from the configuration, as far as it is derived, to the option's value. It
stands beside the option's declaration where it needs no more than the options there.
`image.derived` and `text.config` have the rules of their own options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from .. import methods
from ..methods.bilora import options as bilora
from ..methods.options import default_lora_alpha
from .options import default_mixed_precision, default_report_to
from .rates import default_learning_rate
from .run import RunConfig

Config = TypeVar("Config", bound=RunConfig)
Rule = tuple[str, Callable[[Config], object]]
"""An option, and the function that derives its value where nobody gave one."""


def default_rho(cfg: RunConfig) -> float | None:
    """The method's own radius; None for a method without one."""
    return methods.default_rho(cfg.method, cfg.modality)


def default_auxiliary_learning_rate(cfg: RunConfig) -> float | None:
    """See `methods.bilora.options`."""
    return bilora.default_auxiliary_learning_rate(
        cfg, method=cfg.method, learning_rate=cfg.learning_rate, modality=cfg.modality
    )


def default_validation_loss_steps(cfg: RunConfig) -> int:
    """Evenly spaced measurements in a run that goes by held-out samples; else none."""
    if cfg.depends_on_heldout and cfg.max_train_steps:
        return cfg.measurement_interval(cfg.max_train_steps)
    return cfg.validation_loss_steps


DERIVED_DEFAULTS: tuple[Rule[RunConfig], ...] = (  # in this order: each may read those above it
    ("lora_alpha", default_lora_alpha),  # from the rank
    ("rho", default_rho),  # from the method
    ("learning_rate", default_learning_rate),  # from the optimizer
    ("auxiliary_learning_rate", default_auxiliary_learning_rate),  # from the learning rate
    ("mixed_precision", default_mixed_precision),
    ("report_to", default_report_to),
)


def derive(cfg: Config, rules: Sequence[Rule[Config]]) -> Config:
    """Fill in by rules, in their order, the options that nobody gave."""
    for option, default in rules:
        if option not in cfg.given_options:
            cfg = replace(cfg, **{option: default(cfg)})
    return cfg
