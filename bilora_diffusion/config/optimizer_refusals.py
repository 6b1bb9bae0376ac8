"""What does not go together with an optimizer; a part of `refusals.REFUSED`."""

from __future__ import annotations

from .conditions import Refusal, other_than, refusal, unlike

OF_OPTIMIZERS: tuple[Refusal, ...] = (
    refusal(
        "bitsandbytes has no kernels for it",
        "use `--optimizer adamw` without `--use_8bit_adam`",
        optimizer="adamw8bit",
        device=other_than("cuda", "cpu", "xpu"),
    ),
    refusal(
        "prodigy has one rate for all, `--learning_rate`",
        "drop it",
        auxiliary_learning_rate=unlike("learning_rate"),
        optimizer="prodigy",
    ),
    refusal(
        "8-bit moments are codes, and it moves the weights by the first of them",
        "use `--optimizer adamw` without `--use_8bit_adam`, or `--method lora-sam`",
        method="lora-msam",
        optimizer="adamw8bit",
    ),
    refusal(
        "there is then no momentum, by which it moves the weights",
        "give `--adam_beta1 0.9` or use `--method lora-sam`",
        method="lora-msam",
        adam_beta1=0,
    ),
)
