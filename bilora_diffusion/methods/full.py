"""Full fine-tuning: every weight of the targets is trained, and there are no adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from .base import Method, Target
from .registry import register


@register("full")
class FullFineTuning(Method):
    """Gradient descent on W itself; options of adapters have no effect or are refused.

    ``--dry_run`` prints the memory that this method needs.
    """

    title = "Full FT"
    summary = "All weights were trained; the folder contains whole models instead of an adapter."

    adapters: ClassVar[tuple[str, ...]] = ()
    exports_weights: ClassVar[bool] = True
    lora_limit: ClassVar[Mapping[str, Any] | None] = None

    def setup(self, targets: Sequence[Target]) -> list[dict[str, Any]]:
        """Make every floating-point weight of the targets trainable.

        Raises:
            UserError: a weight is in half precision.
        """
        self.targets = tuple(targets)
        for target in self.targets:
            for name, parameter in target.model.named_parameters():
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    raise UserError(
                        f"{target.name}.{name} is {parameter.dtype}, which loses small updates; "
                        "load the model in float32 for full fine-tuning."
                    )
                # Quantized weights are stored as integers, which have no gradient.
                parameter.requires_grad_(parameter.is_floating_point())
        return self.param_groups(self.targets)

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for target in self.targets:
            for path, parameter in target.model.named_parameters():
                tensors[f"{target.name}/full/{path}"] = parameter.detach()
        return tensors

    def result_parameters(self, targets: Sequence[Target] | None = None) -> list[nn.Parameter]:
        if targets is None:
            targets = self.targets
        parameters: list[nn.Parameter] = []
        for target in targets:
            parameters += [p for p in target.model.parameters() if p.requires_grad]
        return parameters

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield  # there are no adapters to disable
