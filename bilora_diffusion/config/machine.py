"""What this machine has: packages, the device, the precision that a launcher chose."""

from __future__ import annotations

import importlib.util
import os

from ..errors import UserError


def is_installed(package: str) -> bool:
    """Whether a top-level package can be imported; it is not imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str, option: str, least: str = "") -> None:
    """Refuse an option whose package is missing.

    Args:
        option: it and its value, as the user wrote them.
        least: the version that it needs, such as ">=0.50".

    Raises:
        UserError: it says how to install it.
    """
    if not is_installed(package):
        name = f'"{package}{least}"' if least else package
        raise UserError(f"{option} needs a package that is missing: run `pip install {name}`.")


def device_type() -> str:
    """The kind of device that accelerate will train on: cuda, mps, xpu, ... or cpu."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on"):
        return "cpu"
    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device else "cpu"


def default_precision() -> str:
    """What accelerate launch was told, else the best that the device has.

    ``accelerate launch`` says "no" where nobody chose, so "no" counts as not told.

    Raises:
        UserError: it was told a precision that training does not have.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if told in ("fp16", "bf16"):
        return told
    if told != "no":
        raise UserError(
            f'accelerate is set to mixed precision "{told}", which training does not have:'
            " give --mixed_precision bf16, fp16 or no."
        )
    if device_type() != "cuda":
        return "no"
    import torch

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
