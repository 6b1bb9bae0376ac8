"""The fine-tuning methods. Any file in this folder can register one.

The files are imported when a method is first needed: importing torch and PEFT takes seconds, and a
script's ``--help`` does not need them. Therefore the options of all methods are in `options`.
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

# Names of this package that need all methods to be registered, with the modules that define them.
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
    """Import every module of this package in alphabetical order, which registers the methods."""
    for module in walk_packages(__path__, f"{__name__}."):
        import_module(module.name)
