"""Training steps: a task, a method and their optimizer, with exact resume.

The step's micro-batches (data, noise and timesteps come from generators keyed by seed, step and
sample, never from global random state) are frozen, and `method.step` gets a closure that runs all
of them. So the result depends neither on how a batch is cut into micro-batches or shared among
processes, nor on where a run was interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from .. import adapters
from ..config.run import HELDOUT_OPTIONS, RunConfig
from ..core.errors import Diverged, UserError
from ..core.seeds import digest_texts, seed_of
from ..methods import Method
from ..run import checkpoint
from ..run.checkpoint import Checkpoint, load_tensors, require_same_settings
from ..run.content import record_content, require_same_content
from ..run.interruption import Interruption
from . import sharding
from .dynamics import Dynamics
from .gradients import initialise
from .outcome import Outcome
from .stepping import (
    ClippedOptimizer,
    Schedule,
    build_optimizer,
    build_scheduler,
    total_steps,
)
from .task import MicroBatch, Task

SPOILT_STEPS = 10
"""So many steps in a row without a finite loss are left out in fp16; then the run ends."""
UNSUITED = "give another model or other parts of it, or other options"


class Trainer:
    """A task, a method and their optimizer, prepared by accelerate and able to take steps.

    Args:
        task: what is trained.
        method: how; its adapters are attached here.
        cfg: training configuration.
        accelerator: made with ``gradient_accumulation_steps=1``: steps are cut here.
        last_step: where the run ends, if not at the end of its schedules.
    """

    def __init__(
        self,
        task: Task,
        method: Method,
        cfg: RunConfig,
        accelerator: Accelerator,
        last_step: int | None = None,
    ) -> None:
        self.task, self.method, self.cfg, self.accelerator = task, method, cfg, accelerator
        self.schedule = Schedule.of(cfg, accelerator)
        self.num_steps = total_steps(cfg, task.num_samples, self.schedule.step_size)
        self.last_step = last_step or self.num_steps
        # The adapters' first values depend on the seed alone, whatever was drawn before.
        torch.manual_seed(seed_of(cfg.seed, "adapters"))
        raw = build_optimizer(cfg, method.setup(task.targets()))
        self.step = 0
        # Its hook sees the gradients before the method's.
        records = cfg.log_dynamics and accelerator.is_main_process
        self.dynamics = Dynamics(self, raw) if records else None
        method.bind(raw)
        self.lr_scheduler = build_scheduler(cfg, raw, self.num_steps)
        task.module.train()  # loaded models come in evaluation mode, in which some never checkpoint
        models = [target.model for target in method.targets]
        self.module, self.optimizer = sharding.prepare(accelerator, task.module, models, raw)
        self.clipped = ClippedOptimizer(accelerator, self.optimizer, method, cfg.max_grad_norm)
        self.outcome = Outcome(method, cfg)
        # Several processes stop together, which they can't before they share a first step.
        self.interruption = Interruption(patient=accelerator.num_processes > 1)
        self._agreed: int | None = None
        self._spoilt = 0  # steps in a row whose loss was not finite
        self._passed: list[tuple[Tensor, MicroBatch]] = []  # losses of the step's forward passes

    @property
    def validation_steps(self) -> int | None:
        """``--validation_epochs`` in steps; None where only the end is validated."""
        epochs = self.cfg.validation_epochs
        if epochs is None:
            return None
        return epochs * -(-self.task.num_samples // self.schedule.step_size)

    def initialise(self) -> None:
        """Start the primaries as ``init_lora_weights`` says, where that depends on weights or
        gradients; once, before the first step of a run that `load` does not continue.

        Raises:
            TrainingError: a loss or a gradient is not finite.
        """
        if initialise(self.task, self.method.targets, self.cfg, self.accelerator):
            self.outcome.begin()

    def probe(self) -> None:
        """Take one row forward and backward, as a step does, and forget its gradients.

        Raises:
            UserError: its loss or a gradient is not finite.
        """
        slot = self.schedule.slots()[0][0]
        (batch,) = self.task.micro_batches([(0, (slot,))], self.schedule.step_size)
        finite = [self.forward_backward([batch])().isfinite()]
        if self.accelerator.scaler is None:  # one starts too high, and finds a scale that fits
            weights = self.method.clip_parameters()
            finite += [w.grad.isfinite().all() for w in weights if w.grad is not None]
        self.clipped.zero_grad()
        if not all(one.item() for one in finite):
            raise UserError(
                f'"{self.cfg.base_model}" gives {batch.names[0]} a loss or gradients that are not'
                f" finite: {UNSUITED}."
            )

    def micro_batches(self) -> Iterator[list[MicroBatch]]:
        """The remaining steps, each as this process's micro-batches."""
        slots, steps = self.schedule.slots(), range(self.step, self.num_steps)
        plan = [(step, own) for step in steps for own in slots]
        stream = self.task.micro_batches(plan, self.schedule.step_size)
        for _ in steps:
            yield [next(stream) for _ in slots]

    def train_step(self, batches: Sequence[MicroBatch]) -> dict[str, Any]:
        """One optimizer step on frozen inputs; returns what is logged about it.

        No number is read before all of the step's work is given to the device.

        Raises:
            Diverged: a loss is not finite; what is saved is untouched.
        """
        started = time.perf_counter()
        self._passed.clear()
        loss = self.method.step(self.forward_backward(batches), self.clipped)
        lr = self.lr_scheduler.get_last_lr()[0]
        if not self.clipped.skipped:
            self.lr_scheduler.step()
            self.outcome.update()
        self.step += 1
        digest, levels = self._seen(batches)
        self._require_finite()
        value = float(loss)
        self._spoilt = 0 if math.isfinite(value) else self._spoilt + 1
        return {
            "loss": value,
            "lr": lr,
            "grad_norm": self.clipped.grad_norm,
            **self.method.metrics(),
            "skipped": self.clipped.skipped,
            **_spread("noise_level", levels),
            "digest": digest,
            **({} if self.dynamics is None else self.dynamics.values()),
            "seconds": time.perf_counter() - started,
        }

    def forward_backward(self, batches: Sequence[MicroBatch]) -> Callable[[], Tensor]:
        """A closure that leaves the whole step's mean gradient in ``.grad``, as often as called."""
        step, device = self.step, self.accelerator.device

        def forward_backward() -> Tensor:
            # Dropout sees the same random numbers at each call and after each resume.
            torch.manual_seed(seed_of(self.cfg.seed, "forward", step, self.schedule.rank))
            total = torch.zeros((), device=device)
            for number, batch in enumerate(batches):
                last = number == len(batches) - 1
                # Gradients are exchanged in the last pass, if by DDP.
                local = not last and not self.accelerator.is_fsdp2
                apart = self.accelerator.no_sync(self.module) if local else nullcontext()
                with apart, self.method.around_batch(batch.samples, batch.snr):
                    losses = self.module(batch.on(device))
                    self._passed.append((losses.detach(), batch))
                    loss = losses.mean() / len(batches)
                    self.accelerator.backward(loss)
                total += loss.detach()
            sharding.average_gradients(
                self.accelerator, self.optimizer, self.method.loose_parameters
            )
            return self.accelerator.reduce(total, reduction="mean")  # pyright: ignore

        return forward_backward

    def _require_finite(self) -> None:
        # A gradient scaler leaves such a step out, and tries the next one with a smaller scale.
        if self.accelerator.scaler is not None and self._spoilt < SPOILT_STEPS:
            return
        for losses, batch in self._passed:
            finite = torch.isfinite(losses).tolist()
            if not all(finite):
                bad = [n for n, good in zip(batch.names, finite, strict=True) if not good]
                raise Diverged(
                    f"the loss at step {self.step} is not finite for {', '.join(bad)}: lower"
                    " --learning_rate or look at these samples; the last checkpoint is untouched."
                )

    def _seen(self, batches: Sequence[MicroBatch]) -> tuple[str, list[float]]:
        """Hash of data, noise and timesteps of the whole step, over all processes, and its
        noise levels.
        """
        mine = [pair for b in batches for pair in zip(b.slots, b.digests, strict=True)]
        levels = [level for b in batches for level in b.levels]
        if self.accelerator.num_processes > 1:
            # A signal may reach each process in another step: it goes along with the digests.
            shared = gather_object([(mine, levels, self.interruption.number)])
            mine = [pair for own, _, _ in shared for pair in own]
            levels = [level for _, own, _ in shared for level in own]
            self._agreed = next((number for *_, number in shared if number), None)
        return digest_texts([text for _, text in sorted(mine)]), levels

    def asked_to_stop(self) -> int | None:
        """The signal that ends the run after this step, the same on every process."""
        return self._agreed if self.accelerator.num_processes > 1 else self.interruption.number

    @property
    def finished(self) -> bool:
        """Test that the run ends here: at its last step, or earlier by its held-out loss."""
        return self.step >= self.last_step or self.outcome.best.exhausted

    @contextmanager
    def evaluating(self, result: bool = False) -> Iterator[None]:
        """Within the context the models act as in use: the primary alone.

        Args:
            result: with the weights that the run leaves, not those of this step; either are
                averaged where averages are kept.
        """
        held = self.outcome.applied() if result else self.outcome.averaged()
        compiled = self.cfg.compile  # whose blocks then run as they are
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with self.method.evaluating(), held, eager:
            yield

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.method.tensors(), **self.outcome.tensors()}

    def save(self, folder: Path) -> None:
        """Write a checkpoint of this step; only the main process does."""
        if self.accelerator.is_main_process:
            checkpoint.save(folder, self._state())
            if self.cfg.checkpoints_total_limit:
                checkpoint.prune(folder, self.cfg.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def _state(self) -> Checkpoint:
        scaler = self.accelerator.scaler
        return Checkpoint(
            step=self.step,
            tensors=self._tensors(),
            optimizer=self.optimizer.optimizer.state_dict(),
            scheduler=self.lr_scheduler.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
            extra={
                **self._size(),
                "config": self.cfg.resume_settings(),
                "content": self.content,
                "method": self.method.state_dict(),
                **self.outcome.state_dict(),
            },
        )

    def _size(self) -> dict[str, int]:
        return {"step_size": self.schedule.step_size, "num_steps": self.num_steps}

    @cached_property
    def content(self) -> dict[str, Any]:
        """Record of the training and the held-out samples (`run.content`)."""
        return record_content(self.task.training_content(), self.task.heldout_content())

    def load(self, path: Path) -> None:
        """Continue exactly where the checkpoint ``path`` was written; once, on a new trainer.

        Raises:
            UserError: it is damaged, or belongs to a run with another configuration or other data.
        """
        saved = checkpoint.load(path)
        with checkpoint.unaltered(path):
            self._restore(saved)

    def _restore(self, saved: Checkpoint) -> None:
        options, size = self.cfg.resume_settings(), self._size()
        saved_size = {key: saved.extra[key] for key in size}
        require_same_work(
            {**saved.extra["config"], **saved_size, "content": saved.extra.get("content")},
            {**options, **size, "content": self.content},
            options=options.keys(),
            # Checkpoints of earlier versions hold options that count for less today.
            free=self._may_change() | self.cfg.free_options,
            depends_on_heldout=self.cfg.depends_on_heldout,
        )
        load_tensors(self._tensors(), saved.tensors)
        for target in self.method.targets:
            adapters.subtract_initial(target.model)
        self.optimizer.optimizer.load_state_dict(saved.optimizer)
        self.lr_scheduler.load_state_dict(saved.scheduler)
        if saved.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.scaler)
        self.method.load_state_dict(saved.extra["method"])
        self.outcome.load_state_dict(saved.extra)
        self.step = saved.step

    def _may_change(self) -> set[str]:
        # How a step is cut and shared does not change its result; nor does a longer run where the
        # learning rate does not depend on the run's length.
        free = {"train_batch_size", "gradient_accumulation_steps"}
        constant = self.cfg.lr_scheduler in ("constant", "constant_with_warmup")
        if constant and not self.method.depends_on_length:
            free |= {"max_train_steps", "num_train_epochs", "num_steps"}
        return free


def require_same_work(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    options: Collection[str],
    free: Set[str],
    depends_on_heldout: bool,
) -> None:
    """Refuse to go on with a run or a search of other options, other data or another size.

    Args:
        saved: options, sizes that follow from them and from the data, and under "content" the
            record of the data. Earlier versions saved neither that nor the held-out options.
        current: the same of this run.
        options: the keys of options.
        free: keys that may differ.
        depends_on_heldout: as `run.content.require_same_content` takes it.

    Raises:
        UserError: the sentence says what differs.
    """
    content = saved.get("content")
    free = free | {"content"}
    if content is None:
        free |= HELDOUT_OPTIONS
    sizes = current.keys() - set(options)
    require_same_settings(saved, current, free | sizes)
    require_same_content(content, current["content"], depends_on_heldout)
    # After the data, since the number of steps can follow from that of the samples.
    require_same_settings(saved, current, free)


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and ends of some values, whatever their order; {} of none."""
    if not values:
        return {}
    mean = math.fsum(values) / len(values)
    return {f"{name}_mean": mean, f"{name}_min": min(values), f"{name}_max": max(values)}
