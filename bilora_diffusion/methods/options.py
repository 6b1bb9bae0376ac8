"""The options of adapters and methods; importing this needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..core.errors import UserError
from ..core.fields import check, option, options_of, unless
from ..core.values import (
    FACTORS,
    INITS,
    RANKS,
    RATES,
    RHO_NORMS,
    SCALES,
    SCHEDULES,
    SHARES,
    Range,
)

# Section of ``--help``.
SECTION = "adapters and method"
RADII = Range(
    1e6,
    "no change of the weights is so large, so it would bound nothing",
    greater_than=0,
    instead="; for plain LoRA use the method lora",
)


@dataclass(frozen=True)
class AdapterOptions:
    """Options of the adapters, and the name of the method that trains them."""

    section: ClassVar[str] = SECTION

    method: str = option(
        "bilora",
        "bilora (two adapters, flat minima; Algorithm 1), lora (one adapter), lora-sam (SAM on the"
        " adapter; Eqs. 3-5), lora-obar or lora-nbar (BAR, Li et al. 2024a), flat-lora (Li et al."
        " 2024b) or full (all weights). Runs that differ only here see the same data and noise;"
        " options of other methods are ignored.",
    )
    # Table A8: rank 4, alpha 8, no dropout.
    rank: int = option(4, "Rank r of the LoRA matrices.", range=RANKS)
    # Derived: `default_lora_alpha`.
    lora_alpha: float = option(
        None,
        "Alpha; the adapter's output is scaled by alpha/r. Default: twice the rank (8).",
        range=SCALES,
    )
    lora_dropout: float = option(0.0, "Dropout in front of the adapters, in [0, 1).", range=SHARES)
    init_lora_weights: str = option(
        "default",
        "How the primary starts: default (A kaiming-uniform, B zero; the paper, PEFT), gaussian (A"
        " normal, as in diffusers' script), pissa (top singular vectors of W; Meng et al. 2024) or"
        " lora-ga (of the loss's gradient; Wang et al. 2024). The last two change the base weights;"
        " the exported file makes up for it.",
        choices=INITS,
    )
    # The file's hash may not change on resume, its place may: `config.lora_sources`.
    init_from: str | None = option(
        None,
        "LoRA file of diffusers, kohya or PEFT, or a run's folder, whose values the primary starts"
        " with; --rank, --lora_alpha and the layers must be the file's. What the file does is then"
        " part of what is trained and exported.",
        is_path=True,
        may_change_on_resume=True,
    )
    lora_ga_samples: int = option(
        128,
        "Samples whose mean gradient lora-ga starts from (Wang et al. 2024).",
        range=Range(10**6, "each is a backward pass before the first step", at_least=1),
        ignored=(unless("init_lora_weights", "lora-ga", "on this start"),),
    )
    use_dora: bool = option(
        False, "Train the primary as a DoRA: magnitude and direction separately (Liu et al. 2024)."
    )
    quantize: str = option(
        "none",
        "Hold the frozen weights of the trained models' linear layers in 4 bits, nf4 with double"
        " quantization (QLoRA, Dettmers et al. 2023; needs bitsandbytes).",
        choices=("none", "nf4"),
    )


def default_lora_alpha(options: AdapterOptions) -> float:
    """Twice the rank, as in the paper's tables."""
    return 2.0 * options.rank


@dataclass(frozen=True)
class MethodFlags:
    """Options of several methods on the command line; each reads some of them (`Method.reads`)."""

    section: ClassVar[str] = SECTION

    # Derived: `Method.usual_rho`, the method's own radius.
    rho: float | None = option(
        None,
        "Radius: of the ball that the auxiliary stays in (bilora, Eq. 8), of the step uphill"
        " (lora-sam, Eq. 4), of the noise (flat-lora). Default: 0.05, for flat-lora 0.1.",
        range=RADII,
    )
    rho_norm: str = option(
        "scaled",
        "bilora: norm that rho bounds: of the weight change with its scale alpha/r, or of the bare"
        " product BA (Eq. 10 to the letter).",
        choices=RHO_NORMS,
    )
    auxiliary_rank: int | None = option(
        None, "bilora: rank r2 of the auxiliary (Section 5.7). Default: the primary's.", range=RANKS
    )
    auxiliary_alpha: float | None = option(
        None, "bilora: alpha of the auxiliary. Default: the primary's.", range=SCALES
    )
    auxiliary_learning_rate: float | None = option(
        None,
        "bilora: eta_2 of Eq. 9. Default: the primary's (Appendix G).",
        range=RATES.or_zero,
    )
    bar_alpha: float = option(
        0.25, "lora-obar, lora-nbar: strength of the balancing (Appendix H.4).", range=FACTORS
    )
    bar_schedule: str = option(
        "constant",
        "lora-obar, lora-nbar: strength constant, or falling to 0 (Li et al. 2024a).",
        choices=SCHEDULES,
    )


@dataclass(frozen=True)
class MethodOptions(MethodFlags):
    """Options that a method is made with.

    Attributes:
        num_steps: optimizer steps of the whole run, for schedules; None where they are not known.
        seed: seed of a method's random numbers, such as Flat-LoRA's noise.

    Raises:
        UserError: a value outside its range.
    """

    num_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # However small a number is: it may ask for a limiting case of a method.
        check(options_of([MethodFlags]), vars(self), dashes="", smallest=0.0)

    def progress(self, step: int) -> float:
        """`step` as a share of the whole run, in (0, 1] for steps 1, 2, ... num_steps.

        Raises:
            UserError: num_steps is not known.
        """
        if self.num_steps is None:
            raise UserError(
                "A schedule needs the length of the run; give num_steps, the optimizer steps in "
                "all."
            )
        return min(1.0, step / self.num_steps)


def rising(schedule: str, progress: float) -> float:
    """A factor that rises from 0 to 1: "linear", or "cosine", which is (1 - cos(pi t)) / 2.

    "constant" is always 1.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return progress
    return (1 - math.cos(math.pi * progress)) / 2


def falling(schedule: str, progress: float) -> float:
    """A factor that falls from 1 to 0 by the same schedules; "constant" is always 1."""
    if schedule == "constant":
        return 1.0
    return 1 - rising(schedule, progress)
