"""Which options don't go together, why, and what to use instead: the one table of them.

The command line refuses what stands here, the contract tests leave it out, and docs/options.md
shows it (``python -m docs.make``).

An option that the chosen method does not read stands without complaint, so that runs which differ
only in ``--method`` can share a recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class Above:
    """Any number above `limit`."""

    limit: float


Values = tuple[Any, ...] | Above


@dataclass(frozen=True)
class Refusal:
    """Options that are refused together.

    Args:
        when: (option, values) pairs; the entry holds where every option has one of its values.
        reason: a clause that follows "since".
        instead: what to do about it, in the imperative, with options in backquotes.
    """

    when: tuple[tuple[str, Values], ...]
    reason: str
    instead: str

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether these values are refused; an option that is not among them has none."""
        return all(_among(values.get(option), wanted) for option, wanted in self.when)

    def sentence(self, values: Mapping[str, Any]) -> str:
        """What the user reads, for values for which the entry holds."""
        first, *others = (_said(option, values[option]) for option, _ in self.when)
        fix = self.instead.replace("`", "")
        return f"{first} with {' and '.join(others)} is refused, since {self.reason}: {fix}."


def _entry(reason: str, instead: str, **when: Any) -> Refusal:
    pairs = (
        (option, wanted if isinstance(wanted, tuple | Above) else (wanted,))
        for option, wanted in when.items()
    )
    return Refusal(tuple(pairs), reason, instead)


REFUSED: tuple[Refusal, ...] = (
    # 4-bit weights
    _entry(
        "4-bit weights can't be trained",
        "drop `--quantize` or use `--method bilora`, `lora` or another with adapters",
        method="full",
        quantize="nf4",
    ),
    _entry(
        "its noise is added to the base weights, and 4 bits can't hold it",
        "drop `--quantize` or use `--method bilora`, `lora-sam` or another that adds no noise",
        method="flat-lora",
        quantize="nf4",
    ),
    _entry(
        "this start is taken out of the base weights, which would be rounded to 4 bits once more",
        "drop `--quantize` or use `--init_lora_weights default` or `gaussian`",
        init_lora_weights=("pissa", "lora-ga"),
        quantize="nf4",
    ),
    # no adapter
    _entry(
        "there is no adapter whose magnitude could be trained apart",
        "drop `--use_dora` or use another method",
        method="full",
        use_dora=True,
    ),
    _entry(
        "there is no adapter to start",
        "drop `--init_lora_weights` or use another method",
        method="full",
        init_lora_weights=("gaussian", "pissa", "lora-ga"),
    ),
    _entry(
        "there is no adapter to put dropout in front of",
        "drop `--lora_dropout` or use another method",
        method="full",
        lora_dropout=Above(0),
    ),
    _entry(
        "kohya's format is for adapters, and this method leaves whole models",
        "drop `--output_kohya_format` or use another method",
        method="full",
        output_kohya_format=True,
    ),
    _entry(
        "there are no factors whose course could be recorded",
        "drop `--log_dynamics` or use another method",
        method="full",
        log_dynamics=True,
    ),
    # precision and loss
    _entry(
        "the gradients of its two passes would have to be unscaled twice by one loss scaler",
        "use `--mixed_precision bf16` or `no`",
        method="lora-sam",
        mixed_precision="fp16",
    ),
    _entry(
        "min-SNR weights are not defined for it, which weighs the noise levels itself",
        "drop one of the two",
        do_edm_style_training=True,
        snr_gamma=Above(0),
    ),
    # Bi-LoRA's ablations
    _entry(
        "only the ball gives the step of a power iteration its length",
        "use `--ball global` or `per-layer`, or `--auxiliary_update optimizer`",
        method="bilora",
        auxiliary_update="power",
        ball="none",
    ),
    _entry(
        "power iteration keeps no moments of the auxiliary",
        "drop `--rescale_moments` or use `--auxiliary_update optimizer`",
        method="bilora",
        auxiliary_update="power",
        rescale_moments=True,
    ),
    _entry(
        "power iteration takes no learning rate",
        "drop `--auxiliary_learning_rate` or use `--auxiliary_update optimizer`",
        method="bilora",
        auxiliary_update="power",
        auxiliary_learning_rate=Above(0),
    ),
    _entry(
        "nothing is projected, so no moments shrink",
        "drop `--rescale_moments` or use `--ball global` or `per-layer`",
        method="bilora",
        ball="none",
        rescale_moments=True,
    ),
    _entry(
        "there is no radius that could rise",
        "drop `--rho_schedule` or use `--ball global` or `per-layer`",
        method="bilora",
        ball="none",
        rho_schedule=("linear", "cosine"),
    ),
    _entry(
        "the step size that Prodigy estimates would not shrink along with them",
        "drop `--rescale_moments` or use `--optimizer AdamW`",
        method="bilora",
        optimizer="prodigy",
        rescale_moments=True,
    ),
    _entry(
        "8-bit moments are codes, which can't be multiplied by a number",
        "drop `--rescale_moments` or `--use_8bit_adam`",
        method="bilora",
        use_8bit_adam=True,
        rescale_moments=True,
    ),
)


def refused(values: Mapping[str, Any]) -> Refusal | None:
    """The first entry that holds for these options, or None.

    Args:
        values: by the name of the option; those left out count as not given.
    """
    return next((entry for entry in REFUSED if entry.holds(values)), None)


def check(values: Mapping[str, Any]) -> None:
    """Refuse options that don't go together.

    Raises:
        UserError: one sentence that names the values, the reason and the fix.
    """
    if (entry := refused(values)) is not None:
        raise UserError(entry.sentence(values))


def rows() -> list[tuple[str, str, str]]:
    """Options together in Markdown, why they are refused, and what to do instead."""
    return [
        (", ".join(_shown(*pair) for pair in entry.when), entry.reason, entry.instead)
        for entry in REFUSED
    ]


def _among(value: Any, wanted: Values) -> bool:
    if isinstance(wanted, Above):
        return value is not None and value > wanted.limit
    return value in wanted


def _said(option: str, value: Any) -> str:
    return f"--{option}" if value is True else f"--{option} {value}"


def _shown(option: str, wanted: Values) -> str:
    if isinstance(wanted, Above):
        return f"`--{option}` above {wanted.limit:g}"
    first, *others = wanted
    return " or ".join((f"`{_said(option, first)}`", *(f"`{value}`" for value in others)))
