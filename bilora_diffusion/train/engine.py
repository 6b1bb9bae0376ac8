"""accelerate's engine: its creation, weights split across processes, and compiled blocks.

FSDP2, for adapters of text models, splits the frozen base weights, which are most of a model, and
gathers one block at a time for a forward or backward pass. The trained parameters (the adapters' A,
B and magnitudes in fp32, a classifier's head) are excluded by FSDP2's own `ignored_params`. They
stay whole on every process, as under DDP, and their gradients are averaged once per step. Therefore

- norms, projections, clipping, averages, checkpoints and exports get whole ordinary tensors: no sum
  can miss a part, and methods do not depend on the number of processes;
- no FSDP2 group mixes the adapters' fp32 with the base's bf16;
- a step costs one all-reduce of the gradients. Split factors would cost two all-gathers for each
  adapted layer in each projection.

This takes little memory compared with a base in bf16: 16 bytes per trained number.

``--compile`` compiles a model's repeated blocks in place, including the adapters. Only training
steps run compiled. Measurements, samples and exports run the blocks without compilation, so they
are bit-identical to those of a run without ``--compile`` at the same weights.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch import nn
from torch.optim import Optimizer

from ..adapters import fused
from ..config.run import RunConfig
from ..core.errors import TrainingError, UserError, reason
from ..core.files import counted, duration

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = DTYPES | {"fp32": torch.float32}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
BACKEND = "inductor"
# Largest number of graphs. Beyond this number, blocks run uncompiled and PyTorch prints a warning.
MAX_GRAPHS = 64
logger = logging.getLogger(__name__)


def build_accelerator(cfg: RunConfig, kind: type[Accelerator] = Accelerator) -> Accelerator:
    """Create accelerate's engine with the precision of the configuration.

    Args:
        cfg: training configuration.
        kind: class of the engine.

    Raises:
        UserError: the device can't compute in this precision.
    """
    # The loss may not depend on a text encoder's last layers. Buffers never change.
    distributed = DistributedDataParallelKwargs(
        find_unused_parameters=cfg.has_unused_parameters, broadcast_buffers=False
    )
    # The other processes may wait a long time while one of them generates images.
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=1))
    logs = str(Path(cfg.output_dir, cfg.logging_dir))
    try:
        accelerator = kind(
            mixed_precision=cfg.mixed_precision,
            log_with=None if cfg.report_to == "none" else cfg.report_to,
            project_config=ProjectConfiguration(project_dir=cfg.output_dir, logging_dir=logs),
            kwargs_handlers=[distributed, waiting],
        )
    except ValueError as error:
        raise UserError(
            f"--mixed_precision {cfg.mixed_precision} does not work here ({error}): use another"
            " precision, such as no."
        ) from error
    read_in_every_process(accelerator)
    if cfg.allow_tf32 and torch.cuda.is_available():
        # TF32 rounds the factors of float32 products to a 10-bit mantissa.
        torch.backends.cuda.matmul.allow_tf32 = True
    keep_freed_memory(accelerator.device)
    return accelerator


def keep_freed_memory(device: torch.device) -> None:
    """Make glibc keep up to 2 GiB of freed memory if training runs on a CPU.

    By default, glibc returns large blocks to the kernel, which then clears their pages for the next
    step.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    libc: Any = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl does not have it
        # By default, both thresholds are 128 KiB: a larger block is mapped separately, and a larger
        # free area at the end of the heap is returned to the kernel.
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def free_memory(accelerator: Accelerator) -> None:
    """Delete the engine's references to a run's objects.

    DDP's reducer must be deleted before the process group is closed. Otherwise the reducer's
    destructor waits for the group's thread, which waits for the interpreter.
    """
    accelerator.free_memory()
    gc.collect()


def close_engine(accelerator: Accelerator) -> None:
    """Close the engine after the last run, with its trackers and its process group."""
    free_memory(accelerator)
    accelerator.end_training()


def read_in_every_process(accelerator: Accelerator) -> None:
    """Make every process read the model's file.

    With ``FSDP_CPU_RAM_EFFICIENT_LOADING``, accelerate gives all processes except the first one
    empty weights, to which no adapter can be added.
    """
    plugin: Any = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        plugin.cpu_ram_efficient_loading = False
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # Transformers reads it there
        logger.info("every process reads the weights; FSDP_CPU_RAM_EFFICIENT_LOADING is ignored")


def prepare(
    accelerator: Accelerator, module: nn.Module, models: Sequence[nn.Module], optimizer: Optimizer
) -> tuple[nn.Module, Any]:
    """Prepare a task's module and its optimizer, like accelerate's `prepare`.

    Under FSDP2, the single model inside the module is split, not the module around it: evaluation
    and generation call the model itself, and every pass must start at FSDP2's root. The optimizer
    keeps the same parameter objects, so hooks still find them.

    Args:
        accelerator: engine.
        module: module of the task.
        models: models inside the module.
        optimizer: optimizer of all trained parameters.

    Returns:
        The module to call, and the prepared optimizer.
    """
    if not accelerator.is_fsdp2:
        # Some parameters are views of trained parameters. DDP must ignore these views.
        trained = {id(parameter) for parameter in parameters_of(optimizer)}
        views = set()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in trained:
                views.add(name)
        # DDP broadcasts and reduces all parameters that require a gradient, except these.
        cast(Any, module)._ddp_params_and_buffers_to_ignore = views
        return accelerator.prepare(module, optimizer)
    from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method

    (model,) = models
    plugin: Any = accelerator.state.fsdp_plugin
    unsplit = {id(parameter) for parameter in parameters_of(optimizer)}
    unsplit |= {id(parameter) for parameter in tied_parameters(model)}
    ignored_modules = []
    for part in model.modules():
        if any(id(parameter) in unsplit for parameter in part.parameters(recurse=False)):
            ignored_modules.append(part)
    plugin.ignored_modules = ignored_modules
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = block_names(model)
    # Weights keep the dtype in which they were loaded, under autocast, as in a single process.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    # FSDP2 creates a new class for a module that it gathers separately, such as the output head.
    # `fused` could not remove its own class below the new one.
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        fused.unfuse(head)
    _, prepared = accelerator.prepare(model, optimizer)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    # `prepare` runs the model itself under autocast, but not the loss around it.
    if accelerator.native_amp:
        module.forward = accelerator.autocast()(module.forward)
    return module, prepared


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return all parameters of an optimizer, in its order."""
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def block_names(model: Any) -> list[str]:
    """Return the class names of the model's blocks, each of which FSDP2 gathers separately.

    These are Transformers' `_no_split_modules`, except those that contain the input embedding
    (BERT's). accelerate splits the embedding separately, so it would be split twice.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    embedding = model.get_input_embeddings()
    block_classes, classes_with_embedding = set(), set()
    for module in model.modules():
        name = type(module).__name__
        if name in names:
            block_classes.add(name)
            if any(part is embedding for part in module.modules()):
                classes_with_embedding.add(name)
    return sorted(block_classes - classes_with_embedding)


def tied_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that several modules share, such as T5's embedding.

    A pass needs them at its start and at its end, so FSDP2 would not free them in between. FSDP2
    also can't put them into one group if one of the modules is called alone, like T5's encoder.
    """
    parameters: list[nn.Parameter] = []
    for module in model.modules():
        parameters += module.parameters(recurse=False)
    counts = Counter(id(parameter) for parameter in parameters)
    return [p for p in dict.fromkeys(parameters) if counts[id(p)] > 1]


@torch.no_grad()
def average_gradients(accelerator: Accelerator, optimizer: Optimizer) -> None:
    """Average the gradients over all processes under FSDP2; DDP averages them itself.

    If a process's rows do not use a parameter (such as an expert in a mixture of experts), its
    gradient counts as zero there. A parameter that no process uses gets no gradient.

    Args:
        accelerator: engine.
        optimizer: optimizer of all trained parameters.
    """
    if accelerator.num_processes == 1 or not accelerator.is_fsdp2:
        return
    parameters = parameters_of(optimizer)
    # All processes must run the same reductions, so they first share which parameters have a
    # gradient.
    is_reached = [float(parameter.grad is not None) for parameter in parameters]
    on_device = torch.tensor(is_reached, device=accelerator.device)
    process_counts: Any = accelerator.reduce(on_device, reduction="sum")
    reached = [p for p, count in zip(parameters, process_counts.tolist(), strict=True) if count]
    if not reached:
        return
    gradients = []
    for parameter in reached:
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        gradients.append(gradient.flatten())
    # One reduction of all gradients, concatenated into one vector.
    mean: Any = accelerator.reduce(torch.cat(gradients), reduction="mean")
    means = mean.split([parameter.numel() for parameter in reached])
    for parameter, values in zip(reached, means, strict=True):
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(values.view_as(parameter))


class Blocks:
    """The repeated blocks of some models, compiled in place.

    Names, weights and adapters do not change. Each combination of block size, input size and
    adapter state has its own graph, which is compiled at its first use; no graph covers several
    sizes. So graphs do not depend on earlier inputs, and a resumed run computes the same values as
    an uninterrupted one.

    Args:
        models: models, of which only those of diffusers are compiled; may be empty.

    Attributes:
        count: number of compiled blocks.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.count = 0
        if not models:
            return
        import torch._dynamo as dynamo  # imported late, since it takes a second

        # Beyond this limit, 8 by default, dynamo runs a block uncompiled. Each image size and each
        # adapter state needs its own graph.
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, MAX_GRAPHS)
        # DDP reduces gradients between blocks anyway, so no graph has to be split for it.
        dynamo.config.optimize_ddp = False
        settings: dict[str, Any] = {"backend": BACKEND}
        if BACKEND == "inductor":
            # Dropout gets the same random numbers as without compilation.
            settings = {"options": {"fallback_random": True}}
        for model in cast(Any, models):
            if hasattr(model, "compile_repeated_blocks"):
                # Some classes of diffusers do not list their repeated blocks, but list the same
                # blocks as those that must not be split across devices.
                if not model._repeated_blocks:
                    model._repeated_blocks = model._no_split_modules
                model.compile_repeated_blocks(dynamic=False, **settings)
            for module in model.modules():
                self.count += module._compiled_call_impl is not None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run a training step that may compile, and log how long the compilation took.

        Raises:
            TrainingError: PyTorch could not compile the blocks.
        """
        if not self.count:
            yield
            return
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import CppCompileError

        # The counters are for the whole process; their differences are for this step.
        graphs_before, seconds_before = _count_compilations()
        try:
            yield
        except (TorchDynamoException, CppCompileError) as error:
            raise TrainingError(
                f"--compile failed at step {number}, run without it: {reason(error)}"
            ) from error
        graphs, seconds = _count_compilations()
        if graphs > graphs_before:
            logger.info(
                "step %d: compiled %d blocks in %s, to %s",
                number,
                self.count,
                duration(seconds - seconds_before),
                counted(graphs - graphs_before, "graph"),
            )


def _count_compilations() -> tuple[int, float]:
    """Return the number of graphs that this process has compiled, and the seconds that it took."""
    from torch._dynamo.utils import calculate_time_spent, counters

    return counters["stats"]["unique_graphs"], calculate_time_spent()["total_wall_time"]
