"""What the paper says of training and held-out loss (Fig. A3), judged by paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..sweep_result import Summary
from .bands import Estimate
from .claims import UNCLEAR, Claim, above, below, both, shown

if TYPE_CHECKING:
    from .generalization_result import GroupGeneralization

NEARLY_IDENTICAL = 0.02
"""Share of the control's training loss within which another counts as nearly identical."""


def judge(groups: Sequence[GroupGeneralization], control: str) -> list[Claim]:
    """The claims on each Bi-LoRA group, against plain LoRA as the control."""
    base = next(group for group in groups if group.label == control)
    found = []
    for own in groups:
        if own.method == "bilora":
            for claim, name in (
                ("training losses are nearly identical", "final_training"),
                ("Bi-LoRA attains a lower held-out loss", "final_heldout"),
                ("Bi-LoRA's gap of held-out minus training loss is smaller", "final_gap"),
            ):
                verdict, said = _judged(getattr(own, name), getattr(base, name), name)
                label = f"{own.label} minus {control}"
                found.append(Claim(label, "Fig. A3", claim, verdict, said))
    return found


def _judged(own: Summary, base: Summary, name: str) -> tuple[str, str]:
    """The verdict, and the difference with its size beside the control's value."""
    difference = own.difference
    if difference is None or base.mean is None:
        return UNCLEAR, "the runs are not paired, so there is no difference"
    estimate = Estimate(difference.mean, difference.interval, {})
    share = f", {difference.mean / base.mean:+.2%} of the control's" if base.mean else ""
    said = (
        f"the final difference is {shown(estimate, '+.5f')}{share}, lower in {difference.better} of"
        f" {difference.seeds} seeds"
    )
    if name != "final_training":
        return below(estimate, 0), said
    width = NEARLY_IDENTICAL * base.mean
    verdicts = [below(estimate, width), above(estimate, -width)]
    return both(verdicts), f"{said} (within {NEARLY_IDENTICAL:.0%} counts as identical)"
