"""``dynamics.md``: the key figures, and what the paper says beside what these runs show."""

from __future__ import annotations

from collections.abc import Sequence

from bilora_diffusion.train.dynamics import COLUMNS, COSINE, FIRST_ORDER, GAIN, ROWS

from ..markdown import table
from .bands import Estimate
from .claims import bullets, shown
from .courses import ALL, CROSS
from .dynamics_result import DynamicsResult, GroupDynamics

SETTLED = ("product", "factors", "A", "B")


def to_markdown(result: DynamicsResult) -> str:
    """The report."""
    where = "all layers as one vector" if result.layer == ALL else f"layer `{result.layer}`"
    lines = [
        "# Training dynamics",
        "",
        f"Of {where}; mean over seeds with its 95 % interval (bootstrap). Cosines are to the last"
        f' recorded weights, which they reach by definition; "settled" is the step from which on a'
        f" cosine stays at {result.level:g} or above.",
        "",
        _settled(result.groups),
    ]
    sam = [group for group in result.groups if FIRST_ORDER in group.curves]
    if sam:
        lines += ["", "## LoRA-SAM: terms of Eq. 5", "", _ratios(sam)]
    dual = [group for group in result.groups if COSINE in group.curves]
    if dual:
        lines += ["", "## Primary and auxiliary", "", _overlaps(dual)]
    if result.claims:
        lines += ["", "## The paper's claims", "", *bullets(result.claims)]
    for name in result.figures:
        lines += ["", f"![{name.removesuffix('.png')}]({name})"]
    if result.notes:
        lines += ["", *(f"- {note}" for note in result.notes)]
    return "\n".join([*lines, "", f"Command: `{result.provenance.command}`", ""])


def _settled(groups: Sequence[GroupDynamics]) -> str:
    titles = ["B A", "A and B", "A", "B"]
    rows = [["run", "seeds", "adapter", *(f"{title} settled" for title in titles), "A at start"]]
    for group in groups:
        for who in ("primary", "auxiliary"):
            if f"{who}/product" in group.settles:
                own = [shown(group.settles[f"{who}/{name}"]) for name in SETTLED]
                start = shown(group.start[f"{who}/A"], ".2f")
                head = [group.label, str(len(group.seeds)), who]
                rows.append([*head, *(f"{text} of {group.steps}" for text in own), start])
    return table(rows[0], rows[1:])


def _ratios(groups: Sequence[GroupDynamics]) -> str:
    head = ["run", "ratio, lowest step", "median step", "highest step"]
    rows = [[*head, "median single layer", "layers above 10000"]]
    for group in groups:
        own = [group.statistics[f"ratio_{name}"] for name in ("lowest", "median", "highest")]
        own.append(group.statistics["layer_ratio"])
        above = shown(group.statistics["layers_above"], ".0%")
        rows.append([group.label, *(shown(value) for value in own), above])
    return table(rows[0], rows[1:])


def _overlaps(groups: Sequence[GroupDynamics]) -> str:
    head = ["run", "Col(B) overlap (random)", "Row(A) overlap (random)", "cosine of B A"]
    rows = [[*head, "largest cosine to the primary's final", "ascent gain, mean over steps"]]
    for group in groups:
        found = group.statistics
        sides = ((COLUMNS, "columns"), (ROWS, "rows"))
        rows.append(
            [
                group.label,
                *(f"{shown(found[f'final_{n}'])} ({group.chance[s]:.3g})" for n, s in sides),
                shown(found[f"final_{COSINE}"]),
                shown(found[f"largest_{CROSS}/product"]),
                shown(found.get(f"mean_{GAIN}", Estimate(None, None, {}))),
            ]
        )
    return table(rows[0], rows[1:])
