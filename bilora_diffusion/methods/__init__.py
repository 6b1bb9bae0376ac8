"""The fine-tuning methods. Importing one registers it; a new method needs one import line here."""

from . import bilora as bilora
from . import lora as lora
from .base import Method, MethodOptions, StepOptimizer, Target, create, names, register

__all__ = ["Method", "MethodOptions", "StepOptimizer", "Target", "create", "names", "register"]
