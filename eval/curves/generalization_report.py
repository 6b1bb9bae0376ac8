"""``generalization.md``: losses, gaps and paired differences, and the paper's claims."""

from __future__ import annotations

from ..markdown import escaped, table
from ..statistics import Paired
from ..sweep_result import Summary
from .claims import bullets, interval_shown, shown
from .generalization_result import GeneralizationResult, GroupGeneralization

SCALE = 1000
COLUMNS = ("final_training", "final_heldout", "final_gap", "lowest_heldout", "equal_training")


def to_markdown(result: GeneralizationResult) -> str:
    """The report; losses times 1000."""
    equal = result.equal_training
    at = f" ({SCALE * equal.training_loss:.2f})" if equal else ""
    titles = ("train", "held-out", "gap", "lowest held-out", f"held-out at equal training loss{at}")
    head = ["run", "seeds", *titles, "step of the lowest"]
    lines = [
        "# Generalization",
        "",
        f"Losses x {SCALE}, mean over seeds; below each, the difference to"
        f" {escaped(result.control)} paired by seed, with its 95 % interval (bootstrap) and the"
        " number of seeds in which it is lower.",
        "",
        table(head, [_cells(group) for group in result.groups]),
    ]
    if result.claims:
        lines += ["", "## The paper's claims", "", *bullets(result.claims)]
    for name in result.figures:
        lines += ["", f"![{name.removesuffix('.png')}]({name})"]
    lines += ["", *(f"- {escaped(note)}" for note in result.notes)]
    return "\n".join([*lines, "", f"Command: `{result.provenance.command}`", ""])


def _cells(group: GroupGeneralization) -> list[str]:
    own = [_summary(getattr(group, name)) for name in COLUMNS]
    return [group.label, str(len(group.seeds)), *own, shown(group.lowest_at)]


def _summary(summary: Summary) -> str:
    value = "n/a" if summary.mean is None else f"{SCALE * summary.mean:.2f}"
    return value if summary.difference is None else f"{value}<br>{_difference(summary.difference)}"


def _difference(difference: Paired) -> str:
    interval = difference.interval
    if interval is not None:
        interval = type(interval)(SCALE * interval.low, SCALE * interval.high)
    said = f"{SCALE * difference.mean:+.2f} {interval_shown(interval, '+.2f')}"
    return f"{said}, {difference.better}/{difference.seeds}"
