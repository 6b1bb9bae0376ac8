"""The optimizers and schedules that the command line names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer

from ..config.run import RunConfig

Groups = list[dict[str, Any]]


def build_optimizer(cfg: RunConfig, groups: Groups) -> Optimizer:
    """The optimizer for a method's parameter groups.

    Args:
        cfg: training configuration.
        groups: parameter groups; each brings its learning rate and weight decay.
    """
    return BUILDERS[cfg.optimizer.lower()](cfg, groups)


def _adamw(cfg: RunConfig, groups: Groups) -> Optimizer:
    # One kernel for all parameters: on a CPU the default takes them one by one, and twice as many
    # cost twice as much.
    optimizer = torch.optim.AdamW(groups, **_adams(cfg), fused=True)
    # A gradient scaler would let its kernel leave a step out, and the hooks after a step would run.
    cast(Any, optimizer)._step_supports_amp_scaling = False
    return optimizer


def _adamw8bit(cfg: RunConfig, groups: Groups) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **_adams(cfg))


def _prodigy(cfg: RunConfig, groups: Groups) -> Optimizer:
    from prodigyopt import Prodigy

    return Prodigy(
        groups,
        **_adams(cfg),
        beta3=cfg.prodigy_beta3,
        decouple=cfg.prodigy_decouple,
        use_bias_correction=cfg.prodigy_use_bias_correction,
        safeguard_warmup=cfg.prodigy_safeguard_warmup,
    )


def _adams(cfg: RunConfig) -> dict[str, Any]:
    return {"betas": (cfg.adam_beta1, cfg.adam_beta2), "eps": cfg.adam_epsilon}


BUILDERS: dict[str, Callable[[RunConfig, Groups], Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "prodigy": _prodigy,
}
"""Builders of `choices.OPTIMIZERS`."""


def build_scheduler(cfg: RunConfig, optimizer: Optimizer, steps: int) -> Any:
    """The learning-rate schedule over ``steps`` optimizer steps, warm-up included."""
    return get_scheduler(
        cfg.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=cfg.warmup_steps(steps),
        num_training_steps=steps,
        num_cycles=cfg.lr_num_cycles,
        power=cfg.lr_power,
    )
