"""Full fine-tuning: every weight of the targets, no adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor, nn

from ..choices import OPTIMIZERS
from ..errors import UserError
from .base import Method, Target
from .registry import register

logger = logging.getLogger(__name__)


@register("full")
class FullFineTuning(Method):
    """W itself by gradient descent; ranks, alphas and inits of the adapters play no part.

    Before it starts it says what memory weights, gradients and optimizer state will need, and
    refuses where the device has less.
    """

    title = "Full FT"
    summary = "All weights were trained; the folder holds whole models instead of an adapter."

    adapters: ClassVar[tuple[str, ...]] = ()
    exports_weights: ClassVar[bool] = True
    limit: ClassVar[Mapping[str, Any] | None] = None

    def setup(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        self.targets = tuple(targets)
        say_memory(self.targets, self.options.optimizer)
        for target in self.targets:
            for name, parameter in target.model.named_parameters():
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    raise UserError(
                        f"{target.name}.{name} is {parameter.dtype}, in which small updates are "
                        "lost; load the model in float32 for full fine-tuning."
                    )
                parameter.requires_grad_(parameter.is_floating_point())
        return self.param_groups(self.targets)

    def param_groups(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        return [
            {
                "params": [p for p in target.model.parameters() if p.requires_grad],
                "lr": target.lr,
                "weight_decay": target.weight_decay,
                "name": target.name,
            }
            for target in targets
        ]

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{target.name}/full/{name}": parameter.detach()
            for target in self.targets
            for name, parameter in target.model.named_parameters()
        }

    def clip_parameters(self) -> list[nn.Parameter]:
        return [p for t in self.targets for p in t.model.parameters() if p.requires_grad]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield


def say_memory(targets: Sequence[Target], optimizer: str) -> None:
    """Say what full fine-tuning of these models takes with an optimizer.

    Raises:
        UserError: the device has less.
    """
    count = sum(p.numel() for target in targets for p in target.model.parameters())
    held = sum(p.nbytes for target in targets for p in target.model.parameters())
    device = next(targets[0].model.parameters()).device
    if device.type == "meta":
        return  # a dry run says it itself
    each = 4 * (2 + OPTIMIZERS[optimizer.lower()].state)  # fp32 weight, gradient, and what is kept
    need, free = count * each, free_memory(device)
    sentence = (
        f"full fine-tuning of {', '.join(t.name for t in targets)}: {count / 1e6:.1f} M weights "
        f"need {need / 1e9:.1f} GB (fp32 weights and gradients, {optimizer}'s state) beside"
        f" activations; {device.type} has {(free + held) / 1e9:.1f} GB for them"
    )
    if need > free + held:
        raise UserError(
            f"{sentence}: use --method lora or bilora, --optimizer adamw8bit, or a larger device."
        )
    logger.info(sentence)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
