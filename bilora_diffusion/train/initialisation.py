"""Initial values of the primaries for an ``init_lora_weights`` that needs weights or gradients.

PiSSA starts from the base weights. LoRA-GA starts from the mean gradient of the loss with respect
to the base weights; the device holds the gradient of one layer at a time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .. import adapters
from ..adapters import INITIAL
from ..adapters.inits import compute, needs_gradient
from ..config.run import RunConfig
from ..core.errors import TrainingError
from ..core.seeds import seed_of
from ..methods import Target
from .task import Task

# Scales of the loss for fp16 weights, tried in this order until no gradient overflows.
FP16_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)
logger = logging.getLogger(__name__)


def initialise(
    task: Task, targets: Sequence[Target], cfg: RunConfig, accelerator: Accelerator
) -> None:
    """Give the primaries of a task's models the initial values of their init.

    Each process computes all values. Then the first process broadcasts its values, so that all
    processes have the same bits.

    Args:
        task: task that was prepared by `accelerator`.
        targets: the task's models after `Method.setup`.
        cfg: training configuration.
        accelerator: the run's accelerator.

    Raises:
        UserError: the loss depends on no layer of a model.
        TrainingError: a weight, a loss or a gradient is not finite.
    """
    initialised = [target for target in targets if adapters.layers(target.model, INITIAL)]
    gradients: Mapping[str, Mapping[str, Tensor]] = {}
    if any(needs_gradient(target.spec.init) for target in initialised):
        models = {target.name: target.model for target in initialised}
        gradients = mean_gradients(task, models, cfg, accelerator.device)
    for target in initialised:
        # LoRA-GA, and PiSSA for large layers, use a randomized SVD.
        seed = seed_of(cfg.seed, target.name)
        compute(target.model, target.spec, gradients.get(target.name), seed)
        # Kernels may sum in a different order on each device.
        if accelerator.num_processes > 1:
            for parameter in adapters.parameters(target.model, INITIAL):
                torch.distributed.broadcast(parameter.detach(), src=0)
        adapters.start_from_initial(target.model)


def mean_gradients(
    task: Task, models: Mapping[str, nn.Module], cfg: RunConfig, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """Compute a loss's mean gradient over `lora_ga_samples` samples, at the base weights.

    The samples belong to a step that no run reaches, so training uses the same data as without this
    pass. They depend neither on the batch size nor on the number of processes.

    Args:
        task: task whose module runs as in training.
        models: the adapted models by name.
        cfg: training configuration.
        device: device of the module.

    Returns:
        Gradients by model and module path, in the weights' shapes, in fp32 or wider, on the CPU. A
        layer that the loss does not depend on is missing.

    Raises:
        TrainingError: a loss or a gradient is not finite.
    """
    samples, size = cfg.lora_ga_samples, cfg.train_batch_size
    step = task.num_samples << 32  # a whole number of epochs, beyond every run
    schedule = []
    for start in range(0, samples, size):
        schedule.append((step, tuple(range(start, min(start + size, samples)))))
    logger.info("lora-ga: computing the mean gradient of %d samples", samples)
    # In fp16, the gradient of a large loss overflows and that of a small one underflows. The
    # largest scale without overflow is the most exact. The result is divided by the scale.
    scales = FP16_SCALES if has_fp16_layers(models) else (1.0,)
    infinite_layers: list[str] = []
    for scale in scales:
        with contextlib.ExitStack() as stack:
            sums = {}
            for name, model in models.items():
                sums[name] = stack.enter_context(collecting(model))
            for batch in task.micro_batches(schedule, samples):
                # Dropout has its own seed, so that training is the same as without this pass.
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    torch.manual_seed(seed_of(cfg.seed, "lora-ga", batch.slots[0]))
                    losses = task.module(batch.on(device))  # (slots,)
                if not losses.isfinite().all():
                    raise TrainingError(
                        "the loss that lora-ga starts from is not finite for"
                        f" {', '.join(batch.names)}: check these samples or use"
                        " --init_lora_weights default."
                    )
                # Divided by the number of all samples, since the last batch may be smaller.
                (losses.sum() * (scale / samples)).backward()
        infinite_layers = []
        for name, layer_sums in sums.items():
            for path, gradient in layer_sums.items():
                if not gradient.isfinite().all():
                    infinite_layers.append(f"{name}.{path}")
        if not infinite_layers:
            for layer_sums in sums.values():
                for gradient in layer_sums.values():
                    # In place, since all gradients together are as large as the models in fp32.
                    gradient.div_(scale)
            return sums
    other_precision = "--mixed_precision bf16 or no, or " if has_fp16_layers(models) else ""
    raise TrainingError(
        f"the gradient of {infinite_layers[0]} is not finite, so lora-ga can't use it: give"
        f" {other_precision}another --init_lora_weights."
    )


def has_fp16_layers(models: Mapping[str, nn.Module]) -> bool:
    """Return whether any layer with the adapter `INITIAL` has base weights in fp16."""
    for model in models.values():
        for _, layer in adapters.layers(model, INITIAL):
            if adapters.base_weight(layer).dtype == torch.float16:
                return True
    return False


@contextlib.contextmanager
def collecting(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Sum the gradients of the base weights over the backward passes within the context.

    Trained adapters are disabled, so the gradients are those of the base model. Each gradient is
    moved to the CPU as soon as it is computed, and `.grad` is freed: the device holds the gradient
    of one layer at a time, and the CPU holds all of them in fp32. On exit, the same parameters
    require gradients as before.

    Yields:
        Sums over all backward passes so far, by module path, in the weights' shapes, in fp32 or
        wider.
    """
    sums: dict[str, Tensor] = {}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hooks = []
    try:
        with adapters.only(model, adapters.assisting(model)):
            # Gradients of other parameters are not needed and would take memory.
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for path, layer in adapters.layers(model, INITIAL):
                weight = adapters.base_weight(layer).requires_grad_(True)
                adder = partial(_add_gradient, sums, path)
                # The hook runs within the backward pass, as soon as this gradient is complete.
                hooks.append(weight.register_post_accumulate_grad_hook(adder))
            yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _add_gradient(sums: dict[str, Tensor], path: str, weight: Tensor) -> None:
    """Add the gradient of a weight to its sum on the CPU, and free the gradient."""
    gradient = cast(Tensor, weight.grad).detach()
    weight.grad = None  # frees the device's memory before the next layer's backward pass
    # In bf16, a sum over many batches would lose small terms.
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    on_cpu = gradient.to("cpu", dtype)
    if path in sums:
        sums[path].add_(on_cpu)
    else:
        sums[path] = on_cpu
