"""The fine-tuning methods. Importing the file of one registers it; a new one is named in `FILES`.

The files are imported when a method is first asked for: torch and PEFT take seconds, which a
script's ``--help`` has no use for. So the options that single methods have are declared here, as
`OwnOptions`, and taken up in `OWN_OPTIONS`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..core.fields import option
from ..core.values import FACTORS, STEPS, Range
from .options import MethodOptions as MethodOptions
from .options import OwnOptions

if TYPE_CHECKING:
    from .base import Method, StepOptimizer, Target  # noqa: F401
    from .registry import (  # noqa: F401
        check_rho,
        create,
        default_rho,
        for_run,
        get,
        names,
        option_names,
        reads,
        register,
    )

LAZY = {
    ".base": ("Method", "StepOptimizer", "Target"),
    ".registry": (
        *("check_rho", "create", "default_rho", "for_run", "get", "names", "option_names"),
        *("reads", "register"),
    ),
}
"""Names of this package by the module that holds them."""
FILES = (
    *("bar", "bilora.algorithm", "efm_lora", "flat_lora", "full"),
    *("lora", "lora_l2sp", "lora_looksam", "lora_msam", "lora_sam"),
)


@dataclass(frozen=True)
class EFMLoRAOptions(OwnOptions):
    """Options of EFMLoRA alone."""

    efm_beta: float = option(
        0.9,
        "efm-lora: share of the newest perturbation in the average, in (0, 1] (Equation 18).",
        range=Range(1, "it is a share", above=0),
    )
    efm_schedule: str = option(
        "constant",
        "efm-lora: rho constant, or falling as rho / sqrt(step) (its Theorem 2).",
        choices=("constant", "sqrt"),
    )


@dataclass(frozen=True)
class LookSAMOptions(OwnOptions):
    """Options of LoRA-LookSAM alone."""

    looksam_k: int = option(
        5, "lora-looksam: steps from one look uphill to the next (Liu et al. 2022).", range=STEPS
    )
    looksam_alpha: float = option(
        0.7,
        "lora-looksam: weight, in the steps between, of the direction kept from the last look.",
        range=FACTORS,
    )


@dataclass(frozen=True)
class L2SPOptions(OwnOptions):
    """Options of LoRA + L2-SP alone."""

    l2sp_lambda: float = option(
        1e-3,
        "lora-l2sp: weight of the penalty, lambda times the squared norm of the change of the"
        " weights (Li et al. 2018).",
        range=FACTORS,
    )


OWN_OPTIONS: tuple[type[OwnOptions], ...] = (EFMLoRAOptions, L2SPOptions, LookSAMOptions)


def own_options() -> tuple[type[OwnOptions], ...]:
    """The options that single methods have, a dataclass for each; also those of methods that were
    registered elsewhere.
    """
    registry = sys.modules.get(f"{__name__}.registry")
    return tuple(dict.fromkeys((*OWN_OPTIONS, *(registry.own_options() if registry else ()))))


def __getattr__(name: str) -> Any:
    home = next((home for home, names in LAZY.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for file in FILES:
        import_module(f".{file}", __name__)
    return getattr(import_module(home, __name__), name)
