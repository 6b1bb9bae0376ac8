"""The step of the training loop, for every task, method, engine and precision.

The data, noise and timesteps of a step come from generators keyed by seed, step and sample, never
from global random state. They are stored in micro-batches, and `Method.step` gets a closure that
runs all of them at each call. So the result depends neither on how a batch is divided into
micro-batches and among processes nor on where a run was interrupted.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..config.run import RunConfig
from ..core.errors import TrainingError, UserError
from ..core.files import counted
from ..core.seeds import digest_texts, seed_of
from ..methods import Method
from ..run.data import record_content
from ..run.interruption import Interruption
from . import engine
from .dynamics import Dynamics
from .initialisation import initialise
from .optimizers import (
    ClippedOptimizer,
    StepLayout,
    build_optimizer,
    build_scheduler,
    total_steps,
)
from .outcome import Outcome
from .task import MicroBatch, Task

# Largest number of consecutive fp16 steps without a finite loss; one more ends the run.
MAX_NONFINITE_STEPS = 10
# Largest number of consecutive fp16 steps that the gradient scaler skips; one more ends the run.
# The scale starts at 2^16 and is halved at each skipped step. After 30 skipped steps it is 2^-14,
# at which fp16 can represent gradients up to 2^30.
MAX_SKIPPED_STEPS = 30


class Trainer:
    """A trainer that takes the steps of a run with a task and a method, prepared by accelerate.

    Args:
        task: task to train.
        method: method that trains the task; its adapters are attached here.
        cfg: training configuration.
        accelerator: engine with ``gradient_accumulation_steps=1``, since the trainer itself divides
            steps into micro-batches.
    """

    def __init__(
        self, task: Task, method: Method, cfg: RunConfig, accelerator: Accelerator
    ) -> None:
        self.task = task
        self.method = method
        self.cfg = cfg
        self.accelerator = accelerator
        self.layout = StepLayout.from_config(cfg, accelerator)
        self.num_steps = total_steps(cfg, task.num_samples, self.layout.step_size)
        self.step = 0

        # The adapters' initial values depend on the seed alone, not on earlier random numbers.
        torch.manual_seed(seed_of(cfg.seed, "adapters"))
        optimizer = build_optimizer(cfg, method.setup(task.targets()))
        # The hook of `Dynamics` must run before the method's hook, which flips gradients' signs.
        has_dynamics = cfg.log_dynamics and accelerator.is_main_process
        self.dynamics = Dynamics(self, optimizer) if has_dynamics else None
        method.bind(optimizer)
        self.lr_scheduler = build_scheduler(cfg, optimizer, self.num_steps)
        # Loaded models are in evaluation mode, in which some of them ignore gradient checkpointing.
        task.module.train()
        models = [target.model for target in method.targets]
        self.module, self.optimizer = engine.prepare(accelerator, task.module, models, optimizer)
        self.clipped = ClippedOptimizer(accelerator, self.optimizer, method, cfg.max_grad_norm)
        self.outcome = Outcome(method, cfg)

        # Several processes stop together, after a step that all of them take. A signal before the
        # first step waits for it.
        self.interruption = Interruption(patient=accelerator.num_processes > 1)
        self._shared_signal: int | None = None
        self._content: dict[str, Any] | None = None
        self._nonfinite_steps = 0  # number of consecutive steps
        self._skipped_steps = 0  # number of consecutive steps
        self._losses_of_step: list[tuple[Tensor, MicroBatch]] = []  # one entry per forward pass

    @property
    def validation_steps(self) -> int | None:
        """Number of steps between validations; None if only the end is validated."""
        if self.cfg.validation_epochs is None:
            return self.cfg.checkpointing_steps if self.cfg.validates_at_checkpoints else None
        steps_per_epoch = -(-self.task.num_samples // self.layout.step_size)
        return self.cfg.validation_epochs * steps_per_epoch

    @property
    def content(self) -> dict[str, Any]:
        """Record of the training and held-out samples (`run.data`)."""
        if self._content is None:
            heldout = self.task.heldout_content()
            self._content = record_content(self.task.training_content(), heldout)
        return self._content

    def initialise(self) -> None:
        """Give the primaries initial values that depend on weights or gradients.

        Call it once, before the first step of a new run.

        Raises:
            UserError: the loss depends on no layer of a model.
            TrainingError: a weight, a loss or a gradient is not finite.
        """
        initialise(self.task, self.method.targets, self.cfg, self.accelerator)

    def probe(self) -> None:
        """Check the model with a forward and a backward pass on one sample, as in a step.

        Raises:
            UserError: the loss or a gradient is not finite.
        """
        first_slot = self.layout.slots()[0][0]
        (batch,) = self.task.micro_batches([(0, (first_slot,))], self.layout.step_size)
        is_finite = bool(self.forward_backward([batch])().isfinite())
        # A gradient scaler starts too high on purpose and reduces its scale in the first steps.
        if self.accelerator.scaler is None:
            for weight in self.method.result_parameters():
                is_finite &= weight.grad is None or bool(weight.grad.isfinite().all())
        self.clipped.zero_grad()
        if not is_finite:
            raise UserError(
                f'"{self.cfg.base_model}" computes a loss or gradients that are not finite for'
                f" {batch.names[0]}: try --mixed_precision no, or give another model."
            )

    def micro_batches(self) -> Iterator[list[MicroBatch]]:
        """Yield the remaining steps, each as the list of this process's micro-batches."""
        slots = self.layout.slots()
        steps = range(self.step, self.num_steps)
        schedule = list(itertools.product(steps, slots))
        stream = self.task.micro_batches(schedule, self.layout.step_size)
        for _ in steps:
            yield [next(stream) for _ in slots]

    def train_step(self, batches: Sequence[MicroBatch]) -> dict[str, Any]:
        """Take one optimizer step on fixed inputs.

        Returns:
            Values for the log.

        Raises:
            TrainingError: a loss is not finite, or the gradients of many consecutive steps or of
                all steps are not; this step was not saved.
        """
        started = time.perf_counter()
        self._losses_of_step.clear()
        loss = self.method.step(self.forward_backward(batches), self.clipped)
        # The rate of the step that was just taken; the schedule advances below.
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        # A step that the gradient scaler skips does not change any weights.
        if not self.clipped.skipped:
            self.lr_scheduler.step()
        self.step += 1

        # Up to here, work was only queued on the device. Reading values waits for all of it.
        digest, noise_levels, nonfinite_names = self._share_facts(batches)
        self._require_finite(nonfinite_names)
        self._require_progress()
        loss_value = float(loss)
        self._nonfinite_steps = 0 if math.isfinite(loss_value) else self._nonfinite_steps + 1
        values: dict[str, Any] = {
            "loss": loss_value,
            "lr": learning_rate,
            "grad_norm": self.clipped.grad_norm,
            **self.method.metrics(),
            "skipped": self.clipped.skipped,
        }
        if noise_levels:
            # fsum does not depend on the order, which differs with the number of processes.
            values["noise_level_mean"] = math.fsum(noise_levels) / len(noise_levels)
            values["noise_level_min"] = min(noise_levels)
            values["noise_level_max"] = max(noise_levels)
        values["digest"] = digest
        if self.dynamics is not None:
            values |= self.dynamics.values()
        values["seconds"] = time.perf_counter() - started
        return values

    def forward_backward(self, batches: Sequence[MicroBatch]) -> Callable[[], Tensor]:
        """Return a closure that computes the mean gradient of the whole step in ``.grad``.

        Each call of the closure returns the mean loss over all processes, a 0-d tensor.
        """
        step, device = self.step, self.accelerator.device

        def forward_backward() -> Tensor:
            # Dropout sees the same random numbers at each call and after each resume.
            torch.manual_seed(seed_of(self.cfg.seed, "forward", step, self.layout.rank))
            total_loss = torch.zeros((), device=device)
            for number, batch in enumerate(batches):
                # DDP averages gradients over processes in the last backward pass only.
                is_local = number < len(batches) - 1 and not self.accelerator.is_fsdp2
                no_sync = self.accelerator.no_sync(self.module) if is_local else nullcontext()
                with no_sync:
                    losses = self.module(batch.on(device))  # (slots,)
                    self._losses_of_step.append((losses.detach(), batch))
                    # Micro-batches have equal sizes, so the sum is the mean over all slots.
                    loss = losses.mean() / len(batches)
                    self.accelerator.backward(loss)
                total_loss += loss.detach()
            engine.average_gradients(self.accelerator, self.optimizer)
            return self.accelerator.reduce(total_loss, reduction="mean")  # pyright: ignore

        return forward_backward

    def _share_facts(self, batches: Sequence[MicroBatch]) -> tuple[str, list[float], list[str]]:
        """Share facts about a step, and a signal to any process, among all processes.

        Returns:
            Hash of the data, noise and timesteps of the whole step, its noise levels, and the names
            of the samples whose loss is not finite.
        """
        digests: list[tuple[int, str]] = []  # by slot
        levels: list[float] = []
        for batch in batches:
            digests += zip(batch.slots, batch.digests, strict=True)
            levels += batch.levels
        names = self._nonfinite_names()
        if self.accelerator.num_processes > 1:
            shared = gather_object([(digests, levels, names, self.interruption.number)])
            digests, levels, names = [], [], []
            self._shared_signal = None
            for process_digests, process_levels, process_names, number in shared:
                digests += process_digests
                levels += process_levels
                names += process_names
                # If several processes got a signal, all use that of the first of them.
                self._shared_signal = self._shared_signal or number
        # The hash follows the order of the slots, which does not depend on the processes.
        return digest_texts([digest for _, digest in sorted(digests)]), levels, names

    def _nonfinite_names(self) -> list[str]:
        """Return this process's samples with a non-finite loss in a pass of the last step."""
        names = []
        for losses, batch in self._losses_of_step:
            for slot, is_finite in enumerate(torch.isfinite(losses).tolist()):
                if not is_finite:
                    names.append(batch.names[slot])
        return list(dict.fromkeys(names))

    def _require_finite(self, nonfinite_names: Sequence[str]) -> None:
        """Check that the losses of the last step are finite on all processes."""
        # A gradient scaler skips such a step and reduces its scale for the next one.
        if self.accelerator.scaler is not None and self._nonfinite_steps < MAX_NONFINITE_STEPS:
            return
        if nonfinite_names:
            raise TrainingError(
                f"the loss at step {self.step} is not finite for {', '.join(nonfinite_names)}:"
                " lower --learning_rate or check these samples; the last checkpoint is unchanged."
            )

    def _require_progress(self) -> None:
        """Check that not too many consecutive steps, or all steps, had non-finite gradients."""
        self._skipped_steps = self._skipped_steps + 1 if self.clipped.skipped else 0
        has_learned_nothing = self.step == self.num_steps == self._skipped_steps
        if self._skipped_steps > MAX_SKIPPED_STEPS or has_learned_nothing:
            raise TrainingError(
                f"the gradients of the last {counted(self._skipped_steps, 'step')} were not finite,"
                " so fp16's gradient scaler skipped them: give --mixed_precision bf16 or no; the"
                " last checkpoint is unchanged."
            )

    def stop_signal(self) -> int | None:
        """Return the signal that ends the run after this step, the same on every process."""
        if self.accelerator.num_processes == 1:
            return self.interruption.number
        return self._shared_signal

    @property
    def is_finished(self) -> bool:
        """Whether the run ends here: at its last step, or because the patience has run out."""
        return self.step >= self.num_steps or self.outcome.best.is_exhausted

    @contextmanager
    def evaluating(self, final_weights: bool = False) -> Iterator[None]:
        """Use the primary alone, without compilation, within the context, as for an exported file.

        Args:
            final_weights: True for the weights that the run exports, False for those of this step.
        """
        weights = self.outcome.applied() if final_weights else nullcontext()
        uncompiled = nullcontext()
        if self.cfg.compile:
            # Compiled graphs round differently, and users of the exported file run without them.
            uncompiled = torch.compiler.set_stance("force_eager")
        with self.method.evaluating(), weights, uncompiled:
            yield
