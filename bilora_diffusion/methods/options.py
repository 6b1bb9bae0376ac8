"""The options of adapters and methods. Importing this module does not import torch."""

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

# Title of these options' section in ``--help``.
SECTION = "adapters and method"
RADII = Range(
    1e6,
    "no weight change is that large, so it would bound nothing",
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
        " 2024b) or full (all weights). Runs that differ only in this option use the same data and"
        " noise; options of other methods are ignored.",
    )
    # Table A8: rank 4, alpha 8, no dropout.
    rank: int = option(4, "Rank r of the LoRA matrices.", range=RANKS)
    # Derived: `default_lora_alpha`.
    lora_alpha: float = option(
        None,
        "Alpha: the adapter's output is scaled by alpha/r. Default: twice the rank (8).",
        range=SCALES,
    )
    lora_dropout: float = option(0.0, "Dropout of the adapters' inputs, in [0, 1).", range=SHARES)
    init_lora_weights: str = option(
        "default",
        "Initial values of the primary: default (A kaiming-uniform, B zero; as in the paper and"
        " PEFT), gaussian (A normal, as in diffusers' scripts), pissa (top singular vectors of W;"
        " Meng et al. 2024) or lora-ga (singular vectors of the loss's gradient; Wang et al. 2024)."
        " The last two change the base weights; the exported file corrects for this change.",
        choices=INITS,
    )
    # On resume, the file's path may change, but not its hash (`config.lora_sources`).
    init_from: str | None = option(
        None,
        "LoRA file (diffusers, kohya or PEFT) or run folder with the primary's initial values;"
        " --rank, --lora_alpha and the layers must match the file. The trained and exported adapter"
        " then includes the file's effect.",
        is_path=True,
        may_change_on_resume=True,
    )
    lora_ga_samples: int = option(
        128,
        "Number of samples for the mean gradient that lora-ga starts from (Wang et al. 2024).",
        range=Range(10**6, "each sample delays the first training step", at_least=1),
        ignored=(unless("init_lora_weights", "lora-ga", "with this init"),),
    )
    use_dora: bool = option(
        False, "Train the primary with DoRA: magnitude and direction separately (Liu et al. 2024)."
    )
    quantize: str = option(
        "none",
        "Store the frozen weights of the trained models' linear layers in 4 bits: nf4 with double"
        " quantization (QLoRA, Dettmers et al. 2023; needs bitsandbytes).",
        choices=("none", "nf4"),
    )


def default_lora_alpha(options: AdapterOptions) -> float:
    """Return twice the rank, as in the paper's tables."""
    return 2.0 * options.rank


@dataclass(frozen=True)
class MethodFlags:
    """Command-line options of all methods; each method reads some of them (`Method.reads`)."""

    section: ClassVar[str] = SECTION

    # Derived: `Method.usual_rho`, the method's own radius.
    rho: float | None = option(
        None,
        "Radius of the auxiliary's ball (bilora, Eq. 8) or of the perturbation (lora-sam, Eq. 4);"
        " strength of the noise (flat-lora). Default: 0.05; 0.1 for flat-lora.",
        range=RADII,
    )
    rho_norm: str = option(
        "scaled",
        "bilora: norm that rho bounds: scaled (of the weight change, with its scale alpha/r) or"
        " unscaled (of the product BA alone, Eq. 10 as printed).",
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
        "bilora: learning rate of the auxiliary (eta_2 of Eq. 9). Default: the primary's (Appendix"
        " G).",
        range=RATES.or_zero,
    )
    bar_alpha: float = option(
        0.25, "lora-obar, lora-nbar: strength of the balancing (Appendix H.4).", range=FACTORS
    )
    bar_schedule: str = option(
        "constant",
        "lora-obar, lora-nbar: schedule of the strength, constant or falling to 0 (Li et al."
        " 2024a).",
        choices=SCHEDULES,
    )


@dataclass(frozen=True)
class MethodOptions(MethodFlags):
    """Options that a method is created with.

    Attributes:
        num_steps: optimizer steps of the whole run, for schedules; None if unknown.
        seed: seed of a method's random numbers, such as Flat-LoRA's noise.

    Raises:
        UserError: a value is outside its range.
    """

    num_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # Numbers may be as small as needed for a limiting case of a method.
        check(options_of([MethodFlags]), vars(self), dashes="", smallest=0.0)

    def progress(self, step: int) -> float:
        """Return `step` as a fraction of the whole run, in (0, 1] for steps 1, 2, ... num_steps.

        Raises:
            UserError: `num_steps` is None.
        """
        if self.num_steps is None:
            raise UserError(
                "A schedule needs the length of the run; give num_steps, the total number of "
                "optimizer steps."
            )
        return min(1.0, step / self.num_steps)


def rising(schedule: str, progress: float) -> float:
    """Return a factor that rises from 0 to 1 with `progress`.

    "linear" is `progress`, "cosine" is (1 - cos(pi * progress)) / 2, and "constant" is always 1.
    """
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return progress
    return (1 - math.cos(math.pi * progress)) / 2


def falling(schedule: str, progress: float) -> float:
    """Return 1 minus the factor of `rising`, which falls from 1 to 0; "constant" is always 1."""
    if schedule == "constant":
        return 1.0
    return 1 - rising(schedule, progress)
