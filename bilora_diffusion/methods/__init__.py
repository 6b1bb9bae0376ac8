"""The fine-tuning methods. Each file of this folder that registers a method makes it known.

The files are imported when a method is first needed: torch and PEFT take seconds, for which a
script's ``--help`` does not wait. Therefore all options of the methods are in `options`.
"""

from __future__ import annotations

import functools
from importlib import import_module
from pkgutil import walk_packages
from typing import TYPE_CHECKING, Any

from .options import MethodOptions as MethodOptions

if TYPE_CHECKING:
    from .base import Method, StepOptimizer, Target  # noqa: F401
    from .registry import (  # noqa: F401
        create,
        for_run,
        get,
        names,
        option_names,
        reads,
        register,
    )

# Names of this package that need every method to be registered, and where they are defined.
MODULE_OF_NAME = {
    "Method": "base",
    "StepOptimizer": "base",
    "Target": "base",
    "create": "registry",
    "for_run": "registry",
    "get": "registry",
    "names": "registry",
    "option_names": "registry",
    "reads": "registry",
    "register": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register_all()
    return getattr(import_module(f".{MODULE_OF_NAME[name]}", __name__), name)


@functools.cache
def _register_all() -> None:
    """Import every file of this folder, in alphabetical order."""
    for module in walk_packages(__path__, f"{__name__}."):
        import_module(module.name)
