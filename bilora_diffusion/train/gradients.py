"""Gradients of the base weights, which LoRA-GA starts from: one layer on the device at a time."""

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
from ..config.run import RunConfig
from ..core.errors import TrainingError
from ..core.seeds import seed_of
from ..inits import compute, needs_gradient
from ..methods import Target
from .task import Task

FP16_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)
"""Factors of the loss where weights are fp16, until no gradient overflows."""
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def collecting(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the context backward passes add up the gradients of the base weights.

    The adapters are off, so these are the gradients of the model as it came. Each goes to the CPU
    as soon as it is there, and `.grad` is freed: the device never holds more than one layer's, the
    CPU holds all of them in fp32. Afterwards everything requires the gradients that it required.

    Yields:
        By module path, the sum over all backward passes so far, in the weight's shape, fp32 or
        wider.
    """
    sums: dict[str, Tensor] = {}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hooks = []
    try:
        with adapters.only(model, ()):
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for path, layer in adapters.layers(model, INITIAL):
                weight = adapters.base_weight(layer).requires_grad_(True)
                adder = partial(_add, sums, path)
                hooks.append(weight.register_post_accumulate_grad_hook(adder))
            yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _add(sums: dict[str, Tensor], path: str, weight: Tensor) -> None:
    gradient = cast(Tensor, weight.grad).detach()
    weight.grad = None
    moved = gradient.to("cpu", torch.promote_types(gradient.dtype, torch.float32))
    sums[path] = sums[path].add_(moved) if path in sums else moved


def initialise(
    task: Task, targets: Sequence[Target], cfg: RunConfig, accelerator: Accelerator
) -> bool:
    """Give the primaries of a task's models the first values that their init asks for; returns
    whether there was anything to do.

    Every process computes all of it; then the values of the first are given to the others, so that
    they agree bit by bit whatever the device does in parallel.

    Args:
        task: what is trained, prepared by `accelerator`.
        targets: its models after `Method.setup`.

    Raises:
        UserError: the loss reaches no layer of a model.
        TrainingError: a loss or a gradient is not finite.
    """
    wanted = [target for target in targets if adapters.layers(target.model, INITIAL)]
    gradients: Mapping[str, Mapping[str, Tensor]] = {}
    if any(needs_gradient(target.spec.init) for target in wanted):
        models = {target.name: target.model for target in wanted}
        gradients = mean_gradients(task, models, cfg, accelerator.device)
    for target in wanted:
        seed = seed_of(cfg.seed, target.name)
        compute(target.model, target.spec, gradients.get(target.name), seed)
        if accelerator.num_processes > 1:
            for parameter in adapters.parameters(target.model, INITIAL):
                torch.distributed.broadcast(parameter.detach(), src=0)
        adapters.start_from_initial(target.model)
    return bool(wanted)


def mean_gradients(
    task: Task, models: Mapping[str, nn.Module], cfg: RunConfig, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """The mean gradient of a task's own loss over `lora_ga_samples`, at the base weights.

    The samples are those of a step that no run reaches, so that training sees the data that it
    would see without; they depend neither on how they are cut nor on how many processes there are.

    Args:
        task: gives samples, noise and loss; its module runs as in training.
        models: the adapted models by name.

    Returns:
        By model and by module path, in the weight's shape, fp32 or wider, on the CPU. A layer that
        the loss does not reach is missing.

    Raises:
        TrainingError: a loss or a gradient is not finite.
    """
    samples, size = cfg.lora_ga_samples, cfg.train_batch_size
    step = task.num_samples << 32  # a whole number of epochs, beyond every run
    plan = [(step, tuple(range(i, min(i + size, samples)))) for i in range(0, samples, size)]
    logger.info("lora-ga: the mean gradient of %d samples", samples)
    half = any(
        adapters.base_weight(layer).dtype == torch.float16
        for model in models.values()
        for _, layer in adapters.layers(model, INITIAL)
    )
    for scale in FP16_SCALES if half else (1.0,):
        with contextlib.ExitStack() as stack:
            sums = {n: stack.enter_context(collecting(m)) for n, m in models.items()}
            for batch in task.micro_batches(plan, samples):
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    torch.manual_seed(seed_of(cfg.seed, "lora-ga", batch.slots[0]))
                    losses = task.module(batch.on(device))
                if not losses.isfinite().all():
                    raise TrainingError(
                        "the loss that lora-ga starts from is not finite for"
                        f" {', '.join(batch.names)}: look at these samples or use"
                        " --init_lora_weights default."
                    )
                (losses.sum() * (scale / samples)).backward()
        every = [(f"{n}.{p}", g) for n, own in sums.items() for p, g in own.items()]
        bad = [name for name, gradient in every if not gradient.isfinite().all()]
        if not bad:
            return {n: {p: g.div_(scale) for p, g in own.items()} for n, own in sums.items()}
    raise TrainingError(
        f"the gradient of {bad[0]} is not finite, so lora-ga can't start from it: use"
        " --mixed_precision bf16 or no, or another --init_lora_weights."
    )
