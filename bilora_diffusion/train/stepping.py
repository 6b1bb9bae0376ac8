"""One optimizer step: its samples, its pieces, and the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from ..config.run import RunConfig
from ..methods import Method


@dataclass(frozen=True)
class Schedule:
    """Slots of a step that each process computes, and their pieces.

    Args:
        micro_batch: samples of one forward pass on one process.
        accumulation: forward passes of one step on one process.
        processes, rank: how many processes share a step, and which one this is.
    """

    micro_batch: int
    accumulation: int
    processes: int = 1
    rank: int = 0

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


class Remaining(Sequence[tuple[int, tuple[int, ...]]]):
    """(step, slots) of every micro-batch from one step to another, counted and not listed.

    Args:
        first: the first step.
        last: the step that is no longer among them.
        slots: one process's micro-batches of any step, as ``Schedule.slots`` gives them.
    """

    def __init__(self, first: int, last: int, slots: Sequence[tuple[int, ...]]) -> None:
        self._first, self._slots = first, slots
        self._count = max(0, last - first) * len(slots)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        step, part = divmod(range(self._count)[index], len(self._slots))
        return self._first + step, self._slots[part]


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
