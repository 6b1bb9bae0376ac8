"""``landscape.md``: the figures per group, and what has to be known to read them."""

from __future__ import annotations

from collections.abc import Sequence

from ..markdown import escaped, table
from ..provenance import Provenance
from ..statistics import Interval, Paired
from .result import GroupResult, LandscapeResult, Summary

TITLES = {"lora": "LoRA space (A and B)", "full": "full space (weights without the adapters)"}
FIGURES = {
    "rise": "rise along random directions",
    "sharpness": "SAM sharpness",
    "eigenvalue": "top Hessian eigenvalue",
}


def to_markdown(result: LandscapeResult, made: Provenance | None) -> str:
    """The tables, one per space, and notes."""
    lines = ["# Flatness", "", _introduction(result), ""]
    for space in result.settings.spaces:
        lines += [f"## {_title(result, space)}", "", _table(result, space), ""]
    lines += [f"![{name}]({name})" for name in result.figures]
    lines += ["", *(f"- {note}" for note in _notes(result, made)), ""]
    return "\n".join(lines)


def _title(result: LandscapeResult, space: str) -> str:
    title = TITLES[space]
    counts = {e.spaces[space].parameters for e in result.entries if space in e.spaces}
    return f"{title}, {' or '.join(f'{count:,}' for count in sorted(counts))} numbers"


def _introduction(result: LandscapeResult) -> str:
    s = result.settings
    kind = "training" if s.split == "train" else "held-out"
    return (
        f"Mean {kind} loss of {s.images} images at {s.levels} noise levels each, with the same"
        " noise for every run. Lower is flatter. Each figure is a mean over runs with its 95 %"
        f" interval, and its difference to {escaped(result.control)}, paired by seed, with its"
        " 95 % interval (bootstrap, BCa, 9999 resamples) and the number of seeds in which it is"
        " lower."
    )


def _table(result: LandscapeResult, space: str) -> str:
    names = [n for n in FIGURES if n != "eigenvalue" or result.settings.eigenvalue]
    head = ["group", "runs", "loss"]
    for name in names:
        head += [FIGURES[name], "difference"]
    groups = [group for group in result.groups if space in group.spaces]
    return table(head, [_row(group, space, names, result.control) for group in groups])


def _row(group: GroupResult, space: str, names: Sequence[str], control: str) -> list[str]:
    is_control = group.label == control
    label = f"{group.label} (control)" if is_control else group.label
    row = [label, str(len(group.runs)), _mean(group.loss)]
    for name in names:
        summary: Summary = getattr(group.spaces[space], name)
        row += [_mean(summary), "" if is_control else _difference(summary.difference)]
    return row


def _mean(summary: Summary) -> str:
    if summary.mean is None:
        return "n/a"
    return f"{_number(summary.mean)} {_interval(summary.interval)}".strip()


def _difference(found: Paired | None) -> str:
    if found is None:
        return "not paired"
    where = _interval(found.interval, "+")
    return f"{_number(found.mean, '+')} {where}, {found.better}/{found.seeds}".replace(" ,", ",")


def _interval(found: Interval | None, sign: str = "") -> str:
    return f"[{_number(found.low, sign)}, {_number(found.high, sign)}]" if found else ""


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3g}"


def _notes(result: LandscapeResult, made: Provenance | None) -> list[str]:
    s = result.settings
    full = (
        "all weight matrices and convolutions of the trained models"
        if s.full_weights == "all"
        else "the weights that the adapters sit on"
    )
    notes = [
        "Directions are filter-normalized (Li et al. 2018): at radius t every filter has moved by"
        " t times its norm. Filters are the rows of A, the columns of B, and the outputs of a"
        " weight. Biases, norms and DoRA's magnitudes stay where they are. Every run is looked at"
        " along the same directions.",
        f"The full space is {full}; the adapter acts and is not moved.",
        f"Rise: loss at radius {_radii(result)}, minus the loss at 0, mean over both ends of"
        f" {s.directions} directions.",
        f"SAM sharpness: highest L(w + e) - L(w) with ||e|| <= {s.rho:g} over all weights of the"
        f" space together, found by {s.ascent_steps} steps of projected gradient ascent"
        f" ({s.restarts} restarts): a lower bound. A and B have the scale of training, W the"
        " model's own.",
    ]
    if s.eigenvalue:
        notes.append(
            "Top eigenvalue: the algebraically largest of the Hessian, by Lanczos to a relative"
            " accuracy of 1 %; n/a where it did not converge."
        )
    if any(1 < len(group.runs) < 10 for group in result.groups):
        notes.append("With fewer than ten seeds a bootstrap interval is too narrow.")
    if made is not None:
        device = made.device.get("name") or "unknown device"
        notes.append(f"`{made.command}`")
        notes.append(f"Trained on {device}, torch {made.versions.get('torch')}.")
    return notes


def _radii(result: LandscapeResult) -> str:
    return " and ".join(
        f"{own[-1]:g} ({space})" for space, own in result.settings.positions.items()
    )
