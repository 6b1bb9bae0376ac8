"""``--dry_run``: what a run would do and what memory it would take, without weights or training.

Models are built of their configurations (`empty`), and the method is put on them: what is frozen,
trained and kept is counted. What a step holds beside that comes from coefficients for each kind of
model, fitted to what a tracer of every tensor gave (commit 48c0e54; results/dry_run_memory).
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch
from accelerate import Accelerator, init_empty_weights
from torch import nn

from ..adapters import INITIAL, PRIMARY
from ..config.run import RunConfig
from ..core.choices import OPTIMIZERS
from ..core.errors import UserError
from ..core.files import bytes_for_people, counted
from ..methods import Method, for_run
from ..run import provenance
from .search.runs import Fit
from .search.space import RATE, Options, title
from .stepping import Schedule, total_steps

CUDA_CONTEXT, CPU_LIBRARIES = 600_000_000, 100_000_000
"""Bytes that a process takes on a GPU, of 0.4 to 0.8 GB; that a run loads beside this process."""
NUMBER = {"no": 4, "fp16": 2, "bf16": 2}  # bytes
ADAPTER_TITLES = {PRIMARY: "primary", INITIAL: "first values"}
"""Words for adapters in the printed lines, where they are not the adapter's name."""
BEFORE, STEP = "before training", "a training step"
Moments = dict[str, dict[str, int]]
"""Bytes by part at one time or another, without those of what is trained, which is there in
all but `BEFORE`; its gradients are there in `STEP`.
"""


def main(
    build_task: Callable[..., Any],
    moments: Any,
    cfg: RunConfig,
    accelerator: Accelerator,
    search: Callable[[Any], Fit],
) -> None:
    """Print what a run would do and take; of a search, what the largest of its runs takes.

    Args:
        build_task: as `running.Script` has it.
        moments: as `running.Script` has it.
        cfg: configuration of the run.
        accelerator: engine of the run.
        search: makes the search of a task, where the run begins with one.

    Raises:
        UserError: bad input; several processes.
    """
    if accelerator.num_processes > 1:
        raise UserError("--dry_run is about one process: start it with python, not accelerate.")
    task, device = build_task(cfg, accelerator), accelerator.device
    size = Schedule.of(cfg, accelerator).step_size
    steps = total_steps(cfg, task.num_samples, size)
    parts_of: Moments = moments(task, device)
    largest, search_size = [], []
    if cfg.fit:
        fit = search(task)
        options = largest_configuration(fit, task, steps)
        task = with_config(task, fit.config(options))
        largest = [f"what follows is about the largest run of --fit: {title(options)}"]
        search_size = [_search_size(fit.plan.budget, steps)]
    method, trained = attached(task, steps)
    on_cuda = device.type == "cuda"
    process = CUDA_CONTEXT if on_cuda else psutil.Process().memory_info().rss + CPU_LIBRARIES
    taken = complete(parts_of, trained, process)
    peaks = {name: sum(parts.values()) for name, parts in taken.items()}
    most = max(peaks, key=lambda name: peaks[name])
    free = torch.cuda.mem_get_info(device)[0] if on_cuda else psutil.virtual_memory().available
    room = free + process
    verdict = "fits" if peaks[most] <= room else "does not fit (try --quantize or a smaller model)"
    models = ", ".join(f"{t.name} ({type(t.model).__name__})" for t in method.targets)
    count = sum(p.numel() for p in method.clip_parameters())
    epochs = steps * size / task.num_samples
    lines = [
        "--dry_run: nothing is loaded, trained or written.",
        *largest,
        f"{method.title} on {models}: {len(method.layers)} layers, {count:,} parameters",
        f"data: {task.data_summary()}",
        f"steps: {steps:,} of {size}, {counted(f'{epochs:.3g}', 'epoch')}",
        *search_size,
        f"memory of {provenance.device(device)['name']} when it is highest ({most}):",
        *(f"  {bytes_for_people(n):>8}  {part}" for part, n in taken[most].items() if n),
        *(f"peak of {name}: {bytes_for_people(peak)}" for name, peak in peaks.items()),
        f"It {verdict}: the run needs about {bytes_for_people(peaks[most])}, and {device.type} has"
        f" {bytes_for_people(room)} for it.",
    ]
    if cfg.fit and on_cuda and peaks[most] > room:
        lines.append("--fit leaves out of its search what runs out of memory.")
    print("\n".join(lines), flush=True)


def empty(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    """``build()`` in evaluation mode, with frozen weights of a dtype that take no memory, on
    PyTorch's device "meta".
    """
    with init_empty_weights(include_buffers=True):
        model = build()
    if tie := getattr(model, "tie_weights", None):
        tie()  # each use of a shared matrix was made on its own
    return nn.Module.to(model, dtype).requires_grad_(False).eval()


def complete(taken: Moments, trained: dict[str, int], process: int) -> Moments:
    """With what the process takes and, in all but `BEFORE`, what is trained."""
    return {
        name: {
            **parts,
            "the process": process,
            **({} if name == BEFORE else trained),
            "gradients": trained["gradients"] if name == STEP else 0,
        }
        for name, parts in taken.items()
    }


def _search_size(budget: int, steps: int) -> str:
    return (
        f"--fit: before them at most {budget:,} steps, in up to {budget * 2 // steps} runs of"
        f" {steps // 2:,} steps and more; with the last one that is {(budget + steps) / 3600:.2g}"
        " hours for each second that a step takes"
    )


def largest_configuration(fit: Fit, task: Any, steps: int) -> Options:
    """The configuration of a search that takes most memory, with all samples as in the last run.

    Memory rises with each option whatever the others are, so each is set to its largest value in
    turn, for each method.
    """

    @functools.cache
    def trained_bytes(options: Options) -> int:
        _, trained = attached(with_config(task, fit.config(options)), steps)
        return sum(trained.values())

    configurations: list[Options] = [()]
    for configuration in fit.space.starts():
        for name in fit.space.axes():
            if name != RATE:
                configuration = max(fit.space.along(name, configuration), key=trained_bytes)
        configurations.append(configuration)
    return max(configurations, key=trained_bytes)


def with_config(task: Any, cfg: RunConfig) -> Any:
    """The task with another configuration, on the same empty models."""
    changed = copy.copy(task)
    changed.cfg = cfg
    return changed


def attached(task: Any, steps: int) -> tuple[Method, dict[str, int]]:
    """Put a method on copies of a task's models.

    Args:
        task: whose models are empty.
        steps: optimizer steps of the run.

    Returns:
        The method, and the bytes of what is trained and stored with it.
    """
    cfg = task.cfg
    method = for_run(vars(cfg), steps, task.sample_names)
    targets = task.targets()
    method.setup([replace(target, model=copy.deepcopy(target.model)) for target in targets])
    memory = method.memory(cfg.train_batch_size * cfg.gradient_accumulation_steps)
    trained = {
        f"adapters: {ADAPTER_TITLES.get(adapter, adapter)}": size
        for adapter, size in memory.adapters.items()
    }
    moments_per_byte = OPTIMIZERS[cfg.optimizer.lower()].state
    trained["gradients"] = memory.gradients
    trained["the optimizer's state"] = int(moments_per_byte * memory.optimized)
    trained["averages and best weights"] = memory.result * (cfg.use_ema + cfg.keep_best)
    return method, trained
