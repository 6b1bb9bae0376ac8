"""Bi-LoRA: fine-tuning that seeks flat minima at the price of plain LoRA."""

from .api import BiLoRAConfig, attach

__version__ = "0.1.0"

__all__ = ["BiLoRAConfig", "__version__", "attach"]
