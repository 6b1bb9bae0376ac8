"""The auxiliary's learning rate: its default, and its value for each model.

Importing this needs no torch.
"""

from __future__ import annotations

from ...core.errors import UserError
from ..options import MethodFlags

SAMPLE_AUXILIARY_FACTOR = 3
"""An auxiliary of single images moves once per epoch. At the primary's rate it lags behind, and
points less well uphill (docs/methods.md)."""
DIGITS = 9
"""Of a product of rates, so that 3 times 2e-4 is written 0.0006."""


def default_auxiliary_learning_rate(
    options: MethodFlags, *, method: str, learning_rate: float, modality: str
) -> float | None:
    """Three times the primary's rate for several auxiliaries on images.

    Returns:
        None for the primary's own rate, which is the paper's (Appendix G).
    """
    has_several = method == "bilora" and options.auxiliaries != 1
    if has_several and modality == "image":
        return float(f"{SAMPLE_AUXILIARY_FACTOR * learning_rate:.{DIGITS}g}")
    return None


def auxiliary_rate(options: MethodFlags, rate: float, first_rate: float) -> float:
    """eta_2 of Eq. 9 for one of the models that are trained together.

    A rate that is given is that of the first model. The others' keep the ratio that the primaries
    have: text encoders are trained more slowly than the denoiser.

    Args:
        options: With ``auxiliary_learning_rate``.
        rate: Learning rate of the model's primary.
        first_rate: That of the first model's.

    Raises:
        UserError: The first model's rate is 0, so there is no ratio.
    """
    given_rate = options.auxiliary_learning_rate
    if given_rate is None:
        return rate  # eta_2 = eta_1, as in the paper's experiments (Appendix G)
    if rate == first_rate:
        return given_rate
    if first_rate == 0:
        raise UserError(
            "The learning rate of the first model is 0, so auxiliary_learning_rate"
            f" {given_rate} has no ratio to keep for the others; leave it out."
        )
    return given_rate * rate / first_rate
