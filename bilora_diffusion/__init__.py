"""Bi-LoRA: fine-tuning that seeks flat minima at the price of plain LoRA."""

import logging

# PEFT imports bitsandbytes where it is installed, and that asks, on CPUs with bf16 units, for a
# package that only speeds up 4-bit inference: its line would stand before every sentence of ours.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from .api import BiLoRAConfig, attach  # noqa: E402

__version__ = "0.1.0"

__all__ = ["BiLoRAConfig", "__version__", "attach"]
