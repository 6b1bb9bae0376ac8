"""What does not go together with an optimizer; a part of `refusals.REFUSED`."""

from __future__ import annotations

from .conditions import Refusal, other_than, refusal, unlike

_8BIT = ("adamw8bit", "lion8bit")
_OF_SCHEDULE_FREE = (
    ("use_ema", True, "it keeps an average itself", "drop `--use_ema`"),
    (
        "lr_scheduler",
        ("linear", "cosine", "cosine_with_restarts", "polynomial"),
        "its average takes the place of a rate that falls",
        "use `--lr_scheduler constant` or `constant_with_warmup`",
    ),
    (
        "adam_beta1",
        0,
        "its average can't be told from its last point then",
        "give `--adam_beta1 0.9`",
    ),
    (
        "method",
        ("lora-obar", "lora-nbar"),
        "it holds each weight as two points, of which the method would scale one",
        "use `--optimizer adamw` or `--method lora`",
    ),
)
_WITHOUT_MOMENTUM = {
    _8BIT: "8-bit moments are codes, and it moves the weights by the first of them",
    "adafactor": "it keeps no momentum, by which the weights are moved",
    "schedule-free": "its momentum lies in its weights, and not beside them, to move them by",
}

OF_OPTIMIZERS: tuple[Refusal, ...] = (
    refusal(
        "bitsandbytes has no kernels for it",
        "use `--optimizer adamw` or `adafactor`, without `--use_8bit_adam`",
        optimizer=_8BIT,
        device=other_than("cuda", "cpu", "xpu"),
    ),
    *(
        refusal(reason, instead, **{"optimizer": "schedule-free", name: wanted})
        for name, wanted, reason, instead in _OF_SCHEDULE_FREE
    ),
    refusal(
        "prodigy has one rate for all, `--learning_rate`",
        "drop it",
        auxiliary_learning_rate=unlike("learning_rate"),
        optimizer="prodigy",
    ),
    *(
        refusal(
            reason,
            "use `--optimizer adamw` without `--use_8bit_adam`, or `--method lora-sam`",
            method="lora-msam",
            optimizer=names,
        )
        for names, reason in _WITHOUT_MOMENTUM.items()
    ),
    refusal(
        "there is then no momentum, by which it moves the weights",
        "give `--adam_beta1 0.9` or use `--method lora-sam`",
        method="lora-msam",
        adam_beta1=0,
    ),
)
