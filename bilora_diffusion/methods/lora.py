"""LoRA: the primary alone, W = W0 + s * B @ A, by gradient descent."""

from __future__ import annotations

from .base import Method
from .registry import register


@register("lora")
class LoRA(Method):
    """Plain LoRA, which is the default behavior of `Method`."""

    title = "LoRA"
    summary = "Trained as plain LoRA."
