"""Bi-LoRA: fine-tuning that seeks flat minima at the cost of plain LoRA."""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import BiLoRAConfig, attach

# PEFT imports bitsandbytes if it is installed. On CPUs with bf16 units, bitsandbytes then prints
# advice to install a package that only speeds up 4-bit inference, before any other message.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"

__all__ = ["BiLoRAConfig", "__version__", "attach"]


def __getattr__(name: str) -> Any:
    # Imported lazily: torch and PEFT take seconds to import, and --help must not wait for them.
    if name in ("BiLoRAConfig", "attach"):
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
