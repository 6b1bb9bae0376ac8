"""The fine-tuning methods. Importing one registers it; a new method needs one import line here."""

from . import bar as bar
from . import bilora as bilora
from . import flat_lora as flat_lora
from . import full as full
from . import lora as lora
from . import lora_sam as lora_sam
from .base import (
    Method,
    StepOptimizer,
    Target,
    create,
    default_rho,
    get,
    names,
    option_names,
    reads,
    register,
)
from .options import MethodOptions

__all__ = [
    "Method",
    "MethodOptions",
    "StepOptimizer",
    "Target",
    "create",
    "default_rho",
    "get",
    "names",
    "option_names",
    "reads",
    "register",
]
