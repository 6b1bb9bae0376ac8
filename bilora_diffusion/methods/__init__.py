"""The fine-tuning methods. Importing the file of one registers it; a new one is named in `FILES`.

The files are imported when a method is first asked for: torch and PEFT take seconds, which a
script's ``--help`` has no use for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .options import MethodOptions, OwnOptions

if TYPE_CHECKING:
    from .base import (
        Method,
        StepOptimizer,
        Target,
        create,
        default_rho,
        for_run,
        get,
        names,
        option_names,
        reads,
        register,
    )

FILES = ("bar", "bilora", "flat_lora", "full", "lora", "lora_sam")
WITH_OWN_OPTIONS: tuple[str, ...] = ()
"""Those of `FILES` that declare `OwnOptions`: they are imported even for ``--help``."""

__all__ = [
    "FILES",
    "Method",
    "MethodOptions",
    "OwnOptions",
    "StepOptimizer",
    "Target",
    "create",
    "default_rho",
    "for_run",
    "get",
    "names",
    "option_names",
    "own_options",
    "reads",
    "register",
]


def own_options() -> tuple[type[OwnOptions], ...]:
    """The options that single methods declare in their own files, a dataclass for each."""
    for file in WITH_OWN_OPTIONS:
        import_module(f".{file}", __name__)
    base = sys.modules.get(f"{__name__}.base")
    return () if base is None else base.own_options()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for file in FILES:
        import_module(f".{file}", __name__)
    return getattr(import_module(".base", __name__), name)
