"""The optimizer of a run: the layout of its batches, the update, and the schedule of the rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer

from ..config.run import RunConfig
from ..methods import Method


@dataclass(frozen=True)
class StepLayout:
    """How the batch of one optimizer step is cut into micro-batches and shared by processes.

    Attributes:
        micro_batch: samples of one forward pass on one process.
        accumulation: forward passes of one step on one process.
        processes: number of processes that share a step.
        rank: number of this process.
    """

    micro_batch: int
    accumulation: int
    processes: int = 1
    rank: int = 0

    @classmethod
    def from_config(cls, cfg: RunConfig, accelerator: Accelerator) -> StepLayout:
        """Layout of a training configuration for this process."""
        return cls(
            micro_batch=cfg.train_batch_size,
            accumulation=cfg.gradient_accumulation_steps,
            processes=accelerator.num_processes,
            rank=accelerator.process_index,
        )

    @property
    def step_size(self) -> int:
        """Samples of one optimizer step over all processes."""
        return self.micro_batch * self.accumulation * self.processes

    def slots(self) -> list[tuple[int, ...]]:
        """This process's micro-batches of any step, as positions within the step's batch.

        The first micro-batches of all processes come first, then the second ones: with 2 samples,
        2 passes and 2 processes, process 0 has (0, 1) and (4, 5).
        """
        stride = self.micro_batch * self.processes
        micro_batches = []
        for number in range(self.accumulation):
            start = number * stride + self.micro_batch * self.rank
            micro_batches.append(tuple(range(start, start + self.micro_batch)))
        return micro_batches


class ClippedOptimizer:
    """The optimizer of a method: it clips the gradients of the result's weights, then updates.

    Args:
        accelerator: engine, whose gradient scaler may skip an update.
        optimizer: optimizer that the engine prepared.
        method: method, of whose `weights` the gradients are clipped.
        max_grad_norm: largest total norm of their gradients.
    """

    def __init__(
        self, accelerator: Accelerator, optimizer: Any, method: Method, max_grad_norm: float
    ) -> None:
        self._accelerator = accelerator
        self._optimizer = optimizer
        self._method = method
        self._max_grad_norm = max_grad_norm
        self._norm: Any = None

    def step(self) -> None:
        """Clip (after unscaling), then update; a non-finite fp16 gradient skips the update."""
        # The primary alone is clipped: a joint norm with the auxiliary scaled its gradient to 0.70
        # (T5-base at a norm of 1).
        self._norm = self._accelerator.clip_grad_norm_(self._method.weights, self._max_grad_norm)
        self._optimizer.step()

    @property
    def grad_norm(self) -> float | None:
        """The norm before the last clipping; reading it waits for the device."""
        return None if self._norm is None else float(self._norm)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        # AdamW skips parameters without a gradient; those with a zero gradient it moves by their
        # moments.
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def skipped(self) -> bool:
        """True if the gradient scaler skipped the last update.

        Then there is no projection, and the schedule does not advance.
        """
        return bool(self._accelerator.optimizer_step_was_skipped)


def total_steps(cfg: RunConfig, num_samples: int, step_size: int) -> int:
    """Optimizer steps of the whole run: ``max_train_steps``, or the epochs rounded up."""
    if cfg.max_train_steps is not None:
        return cfg.max_train_steps
    assert cfg.num_train_epochs is not None  # the configuration has one of the two
    steps_per_epoch = -(-num_samples // step_size)
    # The last step of an epoch is a full one: it takes the first samples of the next epoch too.
    return cfg.num_train_epochs * steps_per_epoch


def build_optimizer(cfg: RunConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """Build the optimizer that the configuration names, one of `values.OPTIMIZERS`.

    Args:
        cfg: training configuration.
        groups: parameter groups of a method, each with its learning rate and weight decay.
    """
    adam: dict[str, Any] = {"betas": (cfg.adam_beta1, cfg.adam_beta2), "eps": cfg.adam_epsilon}
    match cfg.optimizer.lower():
        case "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, **adam)
        case "prodigy":
            from prodigyopt import Prodigy

            # The groups' rates are factors of the rate that Prodigy estimates.
            return Prodigy(
                groups,
                **adam,
                beta3=cfg.prodigy_beta3,
                decouple=cfg.prodigy_decouple,
                use_bias_correction=cfg.prodigy_use_bias_correction,
                safeguard_warmup=cfg.prodigy_safeguard_warmup,
            )
    # One kernel for all parameters: on a CPU the default updates them one by one, so that Bi-LoRA's
    # would take twice as long as LoRA's.
    optimizer = torch.optim.AdamW(groups, **adam, fused=True)
    # With this flag a gradient scaler lets the kernel skip a step, and the hooks after the step run
    # all the same.
    cast(Any, optimizer)._step_supports_amp_scaling = False
    return optimizer


def build_scheduler(cfg: RunConfig, optimizer: Optimizer, steps: int) -> Any:
    """Build the learning-rate schedule over ``steps`` optimizer steps, warm-up included."""
    return get_scheduler(
        cfg.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=cfg.warmup_steps(steps),
        num_training_steps=steps,
        # These two are read by the schedules with restarts and by the polynomial one alone.
        num_cycles=cfg.lr_num_cycles,
        power=cfg.lr_power,
    )
