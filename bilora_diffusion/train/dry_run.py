"""``--dry_run``: the size of a run and the memory that it needs, without weights or training.

Models are built from their configurations (`empty`), and the method is attached to them, so that
frozen, trained and stored weights can be counted. The other memory of a step is estimated with
coefficients for each kind of model, which were fitted to a trace of every tensor (commit 48c0e54;
results/dry_run_memory).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from torch import nn

from ..adapters import ASSISTANT, INITIAL, PRIMARY, SAMPLING
from ..config.run import RunConfig
from ..core.errors import UserError
from ..core.files import bytes_for_people, counted, describe_hours_per_second
from ..core.values import OPTIMIZERS
from ..methods import Method, for_run
from ..run import provenance
from .engine import build_accelerator
from .optimizers import StepLayout, total_steps
from .setup import Script

# GPU memory of a process without models, in bytes; 0.4 to 0.8 GB were measured.
CUDA_CONTEXT_BYTES = 600_000_000
# Memory of libraries that a run on a CPU loads but a dry run does not, in bytes.
CPU_LIBRARY_BYTES = 100_000_000
# Bytes per number for each value of ``--mixed_precision``.
NUMBER_BYTES = {"no": 4, "fp16": 2, "bf16": 2}
# Titles of adapters in the printed lines, if they differ from the names.
ADAPTER_TITLES = {
    PRIMARY: "primary",
    INITIAL: "first values",
    ASSISTANT: "assistant, frozen",
    SAMPLING: "sampling, frozen",
}
BEFORE, STEP = "before training", "a training step"
# Bytes of each part in each phase of a run; `complete` adds the parts that all tasks have.
PhaseMemory = dict[str, dict[str, int]]


def run(script: Script[Any], configs: Sequence[RunConfig]) -> None:
    """Print the size of a run and the memory that it needs; for several runs, those of the largest.

    Args:
        script: training script.
        configs: configuration of the run, followed by that of its control if there is one.

    Raises:
        UserError: the input is invalid, or there are several processes.
    """
    cfg = configs[0]
    accelerator = build_accelerator(cfg)
    if accelerator.num_processes > 1:
        raise UserError("--dry_run needs a single process: start it with python, not accelerate.")
    task: Any = script.build_task(cfg, accelerator)
    device = accelerator.device
    step_size = StepLayout.from_config(cfg, accelerator).step_size
    steps = total_steps(cfg, task.num_samples, step_size)
    phases = script.memory_by_phase(task, device)
    lines = ["--dry_run: nothing is loaded, trained or written."]
    if len(configs) > 1:
        task = largest_run(task, configs, steps)
        folders = " and ".join(run_cfg.output_dir for run_cfg in configs)
        lines.append(f"two runs, into {folders}; the following lines are for the larger one")
    method, trained = attach_copy(task, steps)
    models = ", ".join(f"{t.name} ({type(t.model).__name__})" for t in method.targets)
    count = sum(parameter.numel() for parameter in method.result_parameters())
    epochs = steps * step_size / task.num_samples
    lines += [
        f"{method.title} on {models}: {len(method.layers)} layers, {count:,} parameters",
        f"data: {task.data_summary()}",
        f"steps: {steps:,} of {step_size}, {counted(f'{epochs:.3g}', 'epoch')}",
    ]
    hours = describe_hours_per_second(steps, "a step")
    lines.append(f"time: not estimated; {hours}, plus the time for evaluations")

    process = process_bytes(device)
    phases = complete(phases, trained, process)
    peaks = {phase: sum(parts.values()) for phase, parts in phases.items()}
    highest = max(peaks, key=lambda phase: peaks[phase])
    device_name = provenance.device(device)["name"]
    lines.append(f"peak memory of {device_name} ({highest}):")
    for part, size in phases[highest].items():
        if size:
            lines.append(f"  {bytes_for_people(size):>8}  {part}")
    for phase, peak in peaks.items():
        lines.append(f"peak of {phase}: {bytes_for_people(peak)}")
    for part, size in script.cpu_bytes(task, device).items():
        available = free_bytes(torch.device("cpu"))
        answer = "fits" if size <= available else "does not fit"
        lines.append(
            f"memory of the CPU: {bytes_for_people(size)} for {part}, which {answer}:"
            f" {bytes_for_people(available)} are free"
        )
    # The run's peaks include its process, so the memory of this process counts as free.
    usable = free_bytes(device) + process
    fits = peaks[highest] <= usable
    result = "fits" if fits else "does not fit (try a smaller model; for adapters, --quantize nf4)"
    lines.append(
        f"It {result}: the run needs about {bytes_for_people(peaks[highest])}, and {device.type}"
        f" has {bytes_for_people(usable)} available."
    )
    print("\n".join(lines), flush=True)


def empty(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    """Build a model with frozen weights that take no memory, on PyTorch's "meta" device.

    Args:
        build: function that builds the model.
        dtype: dtype of the weights.

    Returns:
        The model in evaluation mode.
    """
    with init_empty_weights(include_buffers=True):
        model = build()
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # each use of a shared matrix was built separately
    return nn.Module.to(model, dtype).requires_grad_(False).eval()


def process_bytes(device: torch.device) -> int:
    """Return the bytes of a device's memory that a run takes before it loads anything."""
    if device.type == "cuda":
        return CUDA_CONTEXT_BYTES
    # This process has imported torch and diffusers, which the run will import too.
    return psutil.Process().memory_info().rss + CPU_LIBRARY_BYTES


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def complete(phases: PhaseMemory, trained: dict[str, int], process: int) -> PhaseMemory:
    """Add the process to all phases, trained weights to all but `BEFORE`, gradients to `STEP`."""
    complete_phases: PhaseMemory = {}
    for phase, parts in phases.items():
        parts = {**parts, "the process": process}
        if phase != BEFORE:
            parts |= trained
        parts["gradients"] = trained["gradients"] if phase == STEP else 0
        complete_phases[phase] = parts
    return complete_phases


def largest_run(task: Any, configs: Sequence[RunConfig], steps: int) -> Any:
    """Return the task with the configuration that needs the most memory."""
    tasks = [with_config(task, cfg) for cfg in configs]
    return max(tasks, key=lambda candidate_task: trained_bytes(candidate_task, steps))


def trained_bytes(task: Any, steps: int) -> int:
    """Return the bytes of the trained weights and of everything stored for them."""
    _, trained = attach_copy(task, steps)
    return sum(trained.values())


def with_config(task: Any, cfg: RunConfig) -> Any:
    """Return the task with another configuration and the same empty models."""
    # A shallow copy shares the empty models; `attach_copy` copies them.
    changed = copy.copy(task)
    changed.cfg = cfg
    return changed


def attach_copy(task: Any, steps: int) -> tuple[Method, dict[str, int]]:
    """Attach a task's method to copies of its models.

    Args:
        task: task with empty models.
        steps: optimizer steps of the run.

    Returns:
        The method, and the bytes of the trained weights and of everything stored for them, by part.
    """
    cfg = task.cfg
    # Use copies, since `largest_run` attaches several methods to the same models in turn.
    method = for_run(vars(cfg), steps)
    targets = []
    for target in task.targets():
        targets.append(replace(target, model=copy.deepcopy(target.model)))
    method.setup(targets)
    memory = method.memory()
    trained = {}
    for adapter, size in memory.adapters.items():
        trained[f"adapters: {ADAPTER_TITLES.get(adapter, adapter)}"] = size
    # AdamW stores two moments per trained number; 8-bit AdamW needs a quarter of that memory.
    moments_per_byte = OPTIMIZERS[cfg.optimizer.lower()].state
    trained["gradients"] = memory.gradients
    trained["the optimizer's state"] = int(moments_per_byte * memory.optimized)
    trained["best weights"] = memory.result * cfg.keep_best  # a copy of the result's weights
    return method, trained
