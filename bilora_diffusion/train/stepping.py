"""One optimizer step: its samples, its pieces, and the update by what the command line names."""

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
class Schedule:
    """Slots of a step that each process computes, and their pieces."""

    micro_batch: int  # samples of one forward pass on one process
    accumulation: int  # forward passes of one step on one process
    processes: int = 1  # that share a step
    rank: int = 0  # of this one

    @classmethod
    def of(cls, cfg: RunConfig, accelerator: Accelerator) -> Schedule:
        """Schedule of a training configuration for this process."""
        return cls(
            cfg.train_batch_size,
            cfg.gradient_accumulation_steps,
            accelerator.num_processes,
            accelerator.process_index,
        )

    @property
    def step_size(self) -> int:
        """Samples of one optimizer step over all processes."""
        return self.micro_batch * self.accumulation * self.processes

    def slots(self) -> list[tuple[int, ...]]:
        """This process's micro-batches of any step, as positions within the step's batch."""
        stride = self.micro_batch * self.processes
        first = self.micro_batch * self.rank
        return [
            tuple(range(first + m * stride, first + m * stride + self.micro_batch))
            for m in range(self.accumulation)
        ]


class ClippedOptimizer:
    """Optimizer as methods see it: clips the gradients that it wants clipped, then updates once.

    ``skipped`` tells whether the gradient scaler left the update out, in which case neither
    projection nor schedule may move on.
    """

    def __init__(
        self, accelerator: Accelerator, optimizer: Any, method: Method, max_grad_norm: float
    ) -> None:
        self._accelerator, self._optimizer = accelerator, optimizer
        self._method, self._max_grad_norm = method, max_grad_norm
        self._norm: Any = None

    def step(self) -> None:
        """Clip (after unscaling), then update; a non-finite fp16 gradient skips the update."""
        self._norm = self._accelerator.clip_grad_norm_(self._method.weights, self._max_grad_norm)
        self._optimizer.step()

    @property
    def grad_norm(self) -> float | None:
        """The norm before the last clipping; asked for after the update, which waits for none."""
        return None if self._norm is None else float(self._norm)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def skipped(self) -> bool:
        """Test that the last update was left out by the gradient scaler."""
        return bool(self._accelerator.optimizer_step_was_skipped)


def total_steps(cfg: RunConfig, num_samples: int, step_size: int) -> int:
    """Optimizer steps of the whole run: ``max_train_steps``, or the epochs rounded up."""
    if cfg.max_train_steps is not None:
        return cfg.max_train_steps
    assert cfg.num_train_epochs is not None  # one of the two is there
    return cfg.num_train_epochs * -(-num_samples // step_size)


def build_optimizer(cfg: RunConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer, one of `choices.OPTIMIZERS`, for a method's parameter groups, each of which
    brings its learning rate and weight decay.
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
