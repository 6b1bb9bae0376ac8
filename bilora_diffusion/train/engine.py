"""accelerate's engine: how it is made, weights split over processes, and compiled blocks.

FSDP2, for adapters of text models, splits the frozen base weights, which are nearly all of a model,
and gathers one block at a time for a forward or backward pass. What is trained (the adapters' A, B
and magnitudes in fp32, a classifier's head) is left out of it by FSDP2's own `ignored_params`: it
stays whole on every process, as under DDP, and its gradients are averaged once per step. So

- norms, projections, clipping, averages, checkpoints and exports see whole ordinary tensors, so no
  sum can miss a part, and a method can't tell how many processes there are;
- no group of FSDP2 mixes the adapters' fp32 with the base's bf16;
- a step costs one all-reduce of the gradients. Split factors would cost two all-gathers for each
  adapted layer in each projection.

It costs little memory compared with a base in bf16: 16 bytes for each trained number.

``--compile`` compiles a model's repeated blocks in place with the adapters inside. Only training
steps run compiled. Measurements, samples and exports use the blocks as they are, so that they are
to the bit what the same weights give without ``--compile``.
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
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
BACKEND = "inductor"
# Largest number of graphs. With more of them blocks run uncompiled, of which PyTorch warns.
MAX_GRAPHS = 64
logger = logging.getLogger(__name__)


def build_accelerator(cfg: RunConfig, kind: type[Accelerator] = Accelerator) -> Accelerator:
    """Make accelerate's engine in the precision of the configuration.

    Args:
        cfg: training configuration.
        kind: class of the engine.

    Raises:
        UserError: the device can't compute in this precision.
    """
    # The loss may not depend on a text encoder's last layers. Buffers do not change.
    distributed = DistributedDataParallelKwargs(
        find_unused_parameters=cfg.has_unused_parameters, broadcast_buffers=False
    )
    # The other processes may wait for long while one samples images.
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
            f"--mixed_precision {cfg.mixed_precision} does not work here ({error}): use bf16 or no."
        ) from error
    read_in_every_process(accelerator)
    if cfg.allow_tf32 and torch.cuda.is_available():
        # It rounds the factors of float32 products to 10 bits of mantissa.
        torch.backends.cuda.matmul.allow_tf32 = True
    keep_freed_memory(accelerator.device)
    return accelerator


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU let glibc keep up to 2 GiB of freed memory.

    By default it returns large blocks to the kernel, which clears each page for the next step.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    libc: Any = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        # Both thresholds are 128 KiB by default: a larger block is mapped separately, and a larger
        # free end of the heap is returned.
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def free_memory(accelerator: Accelerator) -> None:
    """Delete what the engine holds of a run.

    DDP's reducer must be deleted before the process group is closed. In the other order the
    reducer's end waits for the group's thread, which waits for the interpreter.
    """
    accelerator.free_memory()
    gc.collect()


def close_engine(accelerator: Accelerator) -> None:
    """End the engine after the last run: its trackers and its process group."""
    free_memory(accelerator)
    accelerator.end_training()


def read_in_every_process(accelerator: Accelerator) -> None:
    """Let every process read the model's file.

    With ``FSDP_CPU_RAM_EFFICIENT_LOADING`` accelerate gives other processes than the first one
    empty weights, on which no adapter can be put.
    """
    plugin: Any = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        plugin.cpu_ram_efficient_loading = False
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # Transformers reads it there
        logger.info("every process reads the weights, whatever FSDP_CPU_RAM_EFFICIENT_LOADING says")


def prepare(
    accelerator: Accelerator, module: nn.Module, models: Sequence[nn.Module], optimizer: Optimizer
) -> tuple[nn.Module, Any]:
    """Prepare a task's module and its optimizer, as accelerate's `prepare`.

    Under FSDP2 the one model within the module is split, not the module around it: evaluation and
    generation call the model itself, and every pass must begin at FSDP2's root. The optimizer's
    parameters are the same objects before and after, so that hooks find them.

    Args:
        accelerator: engine.
        module: module of the task.
        models: models in the module.
        optimizer: optimizer of all trained parameters.

    Returns:
        The module to call, and the prepared optimizer.
    """
    if not accelerator.is_fsdp2:
        # Some parameters are views of trained ones, which DDP must leave alone.
        trained = {id(parameter) for parameter in parameters_of(optimizer)}
        views = set()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in trained:
                views.add(name)
        # DDP broadcasts and reduces all parameters that require a gradient but these.
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
    # Weights stay in the dtype in which they were loaded, under autocast, as in one process.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    # FSDP2 makes a new class for a module that it gathers separately, as the output head. `fused`
    # could not undo its own class below that one.
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        fused.unfuse(head)
    _, prepared = accelerator.prepare(model, optimizer)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    # `prepare` has put the model itself under autocast, but not the loss around it.
    if accelerator.native_amp:
        module.forward = accelerator.autocast()(module.forward)
    return module, prepared


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer, in its order."""
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def block_names(model: Any) -> list[str]:
    """Classes of the model's blocks, each of which FSDP2 gathers separately.

    These are Transformers' `_no_split_modules` without those around the input embedding (BERT's),
    which accelerate splits separately: they would be split twice.
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
    """Parameters that several modules share, such as T5's embedding.

    A pass needs them at both of its ends, so that FSDP2 would not free them in between. And FSDP2
    can't have them in one group if one of the modules is called alone, as in T5's encoder.
    """
    parameters: list[nn.Parameter] = []
    for module in model.modules():
        parameters += module.parameters(recurse=False)
    counts = Counter(id(parameter) for parameter in parameters)
    return [p for p in dict.fromkeys(parameters) if counts[id(p)] > 1]


@torch.no_grad()
def average_gradients(accelerator: Accelerator, optimizer: Optimizer) -> None:
    """Average the gradients over all processes under FSDP2; DDP averages them itself.

    A parameter that the rows of a process do not reach (an expert of a mixture) counts as zero
    there; one that no process reaches has no gradient.

    Args:
        accelerator: engine.
        optimizer: optimizer of all trained parameters.
    """
    if accelerator.num_processes == 1 or not accelerator.is_fsdp2:
        return
    parameters = parameters_of(optimizer)
    # All processes must make the same reductions, so they first agree on which have a gradient.
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
    # One reduction of all gradients in a row, (numbers of all parameters,).
    mean: Any = accelerator.reduce(torch.cat(gradients), reduction="mean")
    means = mean.split([parameter.numel() for parameter in reached])
    for parameter, values in zip(reached, means, strict=True):
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(values.view_as(parameter))


class Blocks:
    """The repeated blocks of some models, compiled in place.

    Names, weights and adapters stay where they are. The first use of a size of block and input, or
    of a state of the adapters, compiles a graph for it; no graph is for several sizes. So graphs do
    not depend on earlier inputs, and a resumed run computes as an uninterrupted one.

    Args:
        models: models, of which those of diffusers are compiled; may be none.

    Attributes:
        count: number of compiled blocks.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.count = 0
        if not models:
            return
        import torch._dynamo as dynamo  # late, since it takes a second

        # Beyond this limit, 8 by default, dynamo runs a block uncompiled. Each size of images and
        # each state of the adapters needs a graph.
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, MAX_GRAPHS)
        # DDP reduces gradients between blocks anyway, so that no graph must be split for it.
        dynamo.config.optimize_ddp = False
        settings: dict[str, Any] = {"backend": BACKEND}
        if BACKEND == "inductor":
            # Dropout gets the same random numbers as without compilation.
            settings = {"options": {"fallback_random": True}}
        for model in cast(Any, models):
            if hasattr(model, "compile_repeated_blocks"):
                # Some classes of diffusers name no repeated blocks, but name the same blocks as
                # those that must not be split over devices.
                if not model._repeated_blocks:
                    model._repeated_blocks = model._no_split_modules
                model.compile_repeated_blocks(dynamic=False, **settings)
            for module in model.modules():
                self.count += module._compiled_call_impl is not None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Context manager: lets a training step compile, and prints how long it took.

        Raises:
            TrainingError: PyTorch could not compile.
        """
        if not self.count:
            yield
            return
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import CppCompileError

        # The counters belong to the process; their differences belong to the step.
        graphs_before, seconds_before = _count_compilations()
        try:
            yield
        except (TorchDynamoException, CppCompileError) as error:
            raise TrainingError(
                f"--compile failed at step {number}, leave it out: {reason(error)}"
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
    """Graphs that this process has compiled so far, and the seconds that this took."""
    from torch._dynamo.utils import calculate_time_spent, counters

    return counters["stats"]["unique_graphs"], calculate_time_spent()["total_wall_time"]
