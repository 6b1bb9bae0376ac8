"""Defaults of Bi-LoRA's options that depend on other options; importing this needs no torch."""

from __future__ import annotations

from ..options import MethodFlags

SAMPLE_AUXILIARY_FACTOR = 3
"""An auxiliary of single images moves once per epoch. At the primary's rate it lags behind, and
points less well uphill (docs/methods.md)."""
DIGITS = 9
"""Of a product of rates, so that 3 times 2e-4 is written 0.0006."""


def default_auxiliary_learning_rate(
    options: MethodFlags, *, method: str, learning_rate: float, modality: str
) -> float | None:
    """The primary's rate, as None (Appendix G); of several auxiliaries on images three times it."""
    has_several = method == "bilora" and options.auxiliaries != 1
    if has_several and modality == "image":
        return float(f"{SAMPLE_AUXILIARY_FACTOR * learning_rate:.{DIGITS}g}")
    return None
