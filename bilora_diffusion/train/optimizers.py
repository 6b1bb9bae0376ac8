"""The optimizers and schedules that the command line names."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer

from ..config.run import RunConfig


def build_optimizer(cfg: RunConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer for a method's parameter groups, one of `choices.OPTIMIZERS`.

    Args:
        cfg: training configuration.
        groups: parameter groups; each brings its learning rate and weight decay.
    """
    adam: dict[str, Any] = {"betas": (cfg.adam_beta1, cfg.adam_beta2), "eps": cfg.adam_epsilon}
    match cfg.optimizer.lower():
        case "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, **adam)
        case "prodigy":
            from prodigyopt import Prodigy

            return Prodigy(
                groups,
                **adam,
                beta3=cfg.prodigy_beta3,
                decouple=cfg.prodigy_decouple,
                use_bias_correction=cfg.prodigy_use_bias_correction,
                safeguard_warmup=cfg.prodigy_safeguard_warmup,
            )
    # One kernel for all parameters: on a CPU the default takes them one by one, and twice as many
    # cost twice as much.
    optimizer = torch.optim.AdamW(groups, **adam, fused=True)
    # A gradient scaler would let its kernel leave a step out, and the hooks after a step would run.
    cast(Any, optimizer)._step_supports_amp_scaling = False
    return optimizer


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
