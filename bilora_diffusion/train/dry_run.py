"""``--dry_run``: what a run would do and what memory it would take, without weights or training.

The model is built of its configuration alone (`adapters.weightless`), and the run's own code goes
through what takes memory: whatever comes before training, one optimizer step with everything that
the optimizer and the method keep, and what is measured and drawn. A `memory.Ledger` looks on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from .. import adapters
from ..adapters import AUXILIARY, INITIAL, PRIMARY
from ..errors import UserError
from ..methods import for_run
from ..methods.full import free_memory
from ..run.config import RunConfig
from .estimate import TRAINING, Estimate, said
from .memory import Ledger, tensors_of
from .stepping import Schedule, total_steps
from .task import MicroBatch, Task
from .trainer import Trainer

CUDA_CONTEXT = 600_000_000
"""Bytes that CUDA's context and the libraries on it take: an assumption, of 0.4 to 0.8 GB."""
ADAPTERS = {PRIMARY: "primary", AUXILIARY: "auxiliary", INITIAL: "first values"}
GRADIENTS, OPTIMIZER = "gradients", "the optimizer's state"
DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


class Rehearsal(Protocol):
    """What a script brings to a dry run."""

    @property
    def task(self) -> Task:
        """The task, on the device, of models without weights."""
        ...

    @property
    def parts(self) -> Mapping[str, Any]:
        """What has weights, by name."""
        ...

    def batches(self, trainer: Trainer, ledger: Ledger) -> list[MicroBatch]:
        """The largest micro-batch of a step."""
        ...

    def measured(self, trainer: Trainer, ledger: Ledger) -> None:
        """What is measured and drawn beside the steps, each in a phase of the ledger."""
        ...


def main(
    rehearse: Callable[[Any, Accelerator, Ledger], Rehearsal],
    cfg: RunConfig,
    accelerator: Accelerator,
) -> Estimate:
    """Print what a run would do and take.

    Raises:
        UserError: bad input; several processes.
    """
    if accelerator.num_processes > 1:
        raise UserError(
            f"--dry_run looks at one process and was started in {accelerator.num_processes}: start"
            " it with python instead of accelerate launch."
        )
    ledger = Ledger()
    rehearsal = rehearse(cfg, accelerator, ledger)
    trainer = trained(rehearsal, accelerator, ledger)
    rehearsal.measured(trainer, ledger)
    on_cuda = accelerator.device.type == "cuda"
    process = CUDA_CONTEXT if on_cuda else psutil.Process().memory_info().rss
    free = free_memory(accelerator.device)
    estimate = Estimate(accelerator.device, tuple(ledger.phases), process, free)
    print("\n".join([*said_of(trainer), "", *said(estimate)]), flush=True)
    return estimate


def trained(rehearsal: Rehearsal, accelerator: Accelerator, ledger: Ledger) -> Trainer:
    """Attach the method to a rehearsed task and take a step; both are seen by the ledger."""
    task: Any = rehearsal.task
    cfg = replace(task.cfg, log_dynamics=False)
    steps = total_steps(cfg, task.num_samples, Schedule.of(cfg, accelerator).step_size)
    method = for_run(cfg, steps, task.sample_names)
    trainer = Trainer(task, method, cfg, accelerator)
    hold(trainer, rehearsal.parts, ledger)
    if cfg.init_lora_weights in adapters.CHANGE_BASE:
        with ledger.phase("first values"):
            trainer.initialise()
    with ledger.phase("the batch"):
        batches = rehearsal.batches(trainer, ledger)
    ledger.claim("the batch and what is kept of the data")
    step(trainer, batches, ledger)
    return trainer


def hold(trainer: Trainer, parts: Mapping[str, Any], ledger: Ledger) -> None:
    """Tell the ledger what the models, the averages and the best weights are for."""
    hold_weights(parts, ledger)
    method, outcome = trainer.method, trainer.outcome
    for target in method.targets:
        for adapter, words in ADAPTERS.items():
            found = adapters.parameters(target.model, adapter)
            ledger.hold(f"adapters: {words}", found)
    ledger.hold(f"adapters: {ADAPTERS[AUXILIARY]}", method.apart())
    for target in method.targets:
        ledger.hold("trained whole", adapters.whole(target.model, PRIMARY).values())
    if outcome.average is not None:
        ledger.hold("moving averages", outcome.average.tensors().values())
    ledger.hold("best weights", outcome.best.tensors().values())


def hold_weights(parts: Mapping[str, Any], ledger: Ledger) -> None:
    """Tell the ledger which weights belong to which part, and their dtypes."""
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            for tensor in tensors_of(part):
                ledger.hold(f"weights: {name}, {_dtype(tensor)}", [tensor])


def _dtype(tensor: Tensor) -> str:
    if hasattr(tensor, "quant_state"):
        return "4 bits"
    return DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def step(trainer: Trainer, batches: Sequence[MicroBatch], ledger: Ledger) -> None:
    """Take two optimizer steps, of which the second finds all that the first one leaves.

    The first gets its gradients from nowhere, since it is to leave only state. In the second each
    pass finds the gradients of the pass before, if the run has several in a step.
    """
    optimizer: Any = trainer.optimizer
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    hooks = [weight.register_post_accumulate_grad_hook(_as_gradient(ledger)) for weight in weights]

    later = {id(p) for p in trainer.method.apart()}  # get theirs in the pass that sees them

    def present(without: Collection[int] = ()) -> None:
        for weight in (weight for weight in weights if id(weight) not in without):
            weight.grad = torch.zeros_like(weight)
        ledger.hold(GRADIENTS, [weight.grad for weight in weights if weight.grad is not None])

    def from_nowhere() -> Tensor:
        present()
        return torch.ones((), device=trainer.accelerator.device)

    with ledger.phase("the optimizer's first step"):
        trainer.method.step(from_nowhere, trainer.clipped)
    state = trainer.optimizer.optimizer.state.values()
    ledger.hold(OPTIMIZER, [v for s in state for v in s.values() if isinstance(v, Tensor)])
    ledger.claim(f"kept by {trainer.method.title} from step to step")
    backward = trainer.forward_backward(batches)

    def last_pass() -> Tensor:
        if trainer.cfg.gradient_accumulation_steps > 1:
            present(later)
        return backward()

    with ledger.phase(TRAINING):
        trainer.method.step(last_pass, trainer.clipped)
    for hook in hooks:
        hook.remove()


def _as_gradient(ledger: Ledger) -> Callable[[Tensor], None]:
    def hold(weight: Tensor) -> None:
        if weight.grad is not None:
            ledger.hold(GRADIENTS, [weight.grad])

    return hold


def said_of(trainer: Trainer) -> list[str]:
    """What is trained, on what and for how long."""
    task, method, cfg = trainer.task, trainer.method, trainer.cfg
    size = trainer.schedule.step_size
    lines = [
        "--dry_run: nothing is loaded, trained or written.",
        *(f"model: {target.name} is a {type(target.model).__name__}" for target in method.targets),
    ]
    epochs = trainer.last_step * size / task.num_samples
    folds = f"; before them --folds {cfg.folds} runs of as many" if cfg.folds else ""
    return [
        *lines,
        *_layers(trainer),
        f"data: {task.data_summary()}",
        f"steps: {trainer.last_step:,} of {size}, {epochs:.3g} epochs{folds}",
    ]


def _layers(trainer: Trainer) -> list[str]:
    method = trainer.method
    if method.exports_weights:
        count = sum(p.numel() for p in method.clip_parameters())
        return [f"trained: all {count:,} weights"]
    kinds = Counter(path.removesuffix(".0").rpartition(".")[2] for path, _ in method.layers())
    kinds_said = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    lines = [f"adapted layers: {sum(kinds.values())} ({kinds_said})"]
    counts = {
        words: sum(p.numel() for t in method.targets for p in adapters.parameters(t.model, name))
        for name, words in ADAPTERS.items()
        if name in method.adapters
    }
    counts["trained whole"] = sum(
        p.numel() for t in method.targets for p in adapters.whole(t.model, PRIMARY).values()
    )
    shown = ", ".join(f"{words} {count:,}" for words, count in counts.items() if count)
    return [*lines, f"trained parameters of {method.title}: {shown}"]
