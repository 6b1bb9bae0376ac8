"""The optimizers and schedules that the command line names."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.optimization import get_scheduler

from ..errors import UserError
from ..run.config import RunConfig


def build_optimizer(cfg: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer for a method's parameter groups.

    Args:
        cfg: training configuration.
        groups: parameter groups; each brings its learning rate and weight decay.

    Raises:
        UserError: an optimizer whose package is missing.
    """
    betas = (cfg.adam_beta1, cfg.adam_beta2)
    if cfg.optimizer.lower() == "prodigy":
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise UserError(
                "--optimizer prodigy needs the package prodigyopt: pip install prodigyopt."
            ) from error
        return Prodigy(
            groups,
            betas=betas,
            beta3=cfg.prodigy_beta3,
            eps=cfg.adam_epsilon,
            decouple=cfg.prodigy_decouple,
            use_bias_correction=cfg.prodigy_use_bias_correction,
            safeguard_warmup=cfg.prodigy_safeguard_warmup,
        )
    if cfg.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                "--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes."
            ) from error
        return AdamW8bit(groups, betas=betas, eps=cfg.adam_epsilon)
    # One kernel for all parameters: on a CPU the default takes them one by one, and twice as many
    # cost twice as much. Under fp16 accelerate could not tell a skipped step of it.
    fused = cfg.mixed_precision != "fp16"
    return torch.optim.AdamW(groups, betas=betas, eps=cfg.adam_epsilon, fused=fused)


def build_scheduler(cfg: RunConfig, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The learning-rate schedule over ``steps`` optimizer steps, warm-up included."""
    return get_scheduler(
        cfg.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=cfg.warmup_steps(steps),
        num_training_steps=steps,
        num_cycles=cfg.lr_num_cycles,
        power=cfg.lr_power,
    )
