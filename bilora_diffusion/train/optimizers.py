"""The optimizer of a run: the layout of its batches, its update, and its learning-rate schedule."""

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
    """The division of an optimizer step's batch into micro-batches and among processes.

    Attributes:
        micro_batch: number of samples per forward pass on one process.
        accumulation: number of forward passes per step on one process.
        processes: number of processes that share a step.
        rank: index of this process.
    """

    micro_batch: int
    accumulation: int
    processes: int = 1
    rank: int = 0

    @classmethod
    def from_config(cls, cfg: RunConfig, accelerator: Accelerator) -> StepLayout:
        """Create the layout of a training configuration for this process."""
        return cls(
            micro_batch=cfg.train_batch_size,
            accumulation=cfg.gradient_accumulation_steps,
            processes=accelerator.num_processes,
            rank=accelerator.process_index,
        )

    @property
    def step_size(self) -> int:
        """Number of samples per optimizer step over all processes."""
        return self.micro_batch * self.accumulation * self.processes

    def slots(self) -> list[tuple[int, ...]]:
        """Return this process's micro-batches of any step, as positions within the step's batch.

        The first micro-batches of all processes come first, then the second ones: with
        micro-batches of 2 samples, 2 passes and 2 processes, process 0 has (0, 1) and (4, 5).
        """
        stride = self.micro_batch * self.processes
        micro_batches = []
        for number in range(self.accumulation):
            start = number * stride + self.micro_batch * self.rank
            micro_batches.append(tuple(range(start, start + self.micro_batch)))
        return micro_batches


class ClippedOptimizer:
    """A method's optimizer, which clips the gradients of the exported weights before an update.

    Args:
        accelerator: the run's accelerator, whose gradient scaler may skip an update.
        optimizer: optimizer that `accelerator` has prepared.
        method: the gradients of its `weights` are clipped.
        max_grad_norm: largest total norm of these gradients.
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
        """Clip the unscaled gradients, then update; a non-finite fp16 gradient skips the update."""
        # The auxiliary is not clipped: a joint norm with it would multiply the primary's gradient
        # by 0.70 (measured with T5-base at a maximum norm of 1).
        self._norm = self._accelerator.clip_grad_norm_(self._method.weights, self._max_grad_norm)
        self._optimizer.step()

    @property
    def grad_norm(self) -> float | None:
        """Norm before the last clipping. Reading it waits for the device."""
        return None if self._norm is None else float(self._norm)

    def zero_grad(self) -> None:
        """Set the gradients to None."""
        # AdamW skips parameters without a gradient, but moves parameters with a zero gradient by
        # their moments.
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def skipped(self) -> bool:
        """Whether the gradient scaler skipped the last update.

        In this case there is no projection, and the schedule does not advance.
        """
        return bool(self._accelerator.optimizer_step_was_skipped)


def total_steps(cfg: RunConfig, num_samples: int, step_size: int) -> int:
    """Return the optimizer steps of the whole run: ``max_train_steps``, or those of the epochs."""
    if cfg.max_train_steps is not None:
        return cfg.max_train_steps
    assert cfg.num_train_epochs is not None  # the configuration has one of the two
    steps_per_epoch = -(-num_samples // step_size)
    # Steps are full: the last step of an epoch continues with samples of the next one. So a run can
    # pass over the data slightly more often than `num_train_epochs` times.
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

            # Prodigy multiplies the groups' rates by the rate that it estimates.
            return Prodigy(
                groups,
                **adam,
                beta3=cfg.prodigy_beta3,
                decouple=cfg.prodigy_decouple,
                use_bias_correction=cfg.prodigy_use_bias_correction,
                safeguard_warmup=cfg.prodigy_safeguard_warmup,
            )
    # Use one kernel for all parameters. On a CPU, the default updates them one at a time, and the
    # update of Bi-LoRA would take twice as long as that of LoRA.
    optimizer = torch.optim.AdamW(groups, **adam, fused=True)
    # If this flag were True, the kernel itself would skip a step for a gradient scaler. `step`
    # would return normally, and the hooks after it would count and project a step that was not
    # taken.
    cast(Any, optimizer)._step_supports_amp_scaling = False
    return optimizer


def build_scheduler(cfg: RunConfig, optimizer: Optimizer, steps: int) -> Any:
    """Build the learning-rate schedule over ``steps`` optimizer steps, including the warm-up."""
    return get_scheduler(
        cfg.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=cfg.warmup_steps(steps),
        num_training_steps=steps,
        # cosine_with_restarts reads `num_cycles`, and polynomial reads `power`.
        num_cycles=cfg.lr_num_cycles,
        power=cfg.lr_power,
    )
