"""What does not go together with an optimizer; a part of `refusals.REFUSED`."""

from __future__ import annotations

from .conditions import Refusal, other_than, refusal, unlike

_8BIT = "8-bit moments are codes, "
_WITHOUT_MOMENTS = {
    "adamw8bit": f"{_8BIT}which can't be multiplied by a number",
    "prodigy": "the step size that Prodigy estimates would not shrink along with them",
}

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
        f"{_8BIT}and it moves the weights by the first of them",
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
    *(
        refusal(
            reason,
            "drop `--rescale_moments` or use `--optimizer adamw` without `--use_8bit_adam`",
            method="bilora",
            optimizer=names,
            rescale_moments=True,
        )
        for names, reason in _WITHOUT_MOMENTS.items()
    ),
)
