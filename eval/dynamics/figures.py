"""Figures 2, A2 and A4 of the paper for recorded runs, and one of the auxiliary's own course."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bilora_diffusion.train.dynamics import (
    COLUMNS,
    COSINE,
    FIRST_ORDER,
    GAIN,
    RATIO,
    ROWS,
    TERMS,
)

from ..plot import canvas, finish, legend_below, line, looks, wrapped
from ..table import Result, Summary
from .courses import ALL, CROSS

TERM_LOOKS = {
    TERMS[0]: (r"$\|B\epsilon_A\|_F$", "tab:red"),
    TERMS[1]: (r"$\|\epsilon_B A\|_F$", "tab:blue"),
    TERMS[2]: (r"$\|\epsilon_B \epsilon_A\|_F$", "tab:green"),
}
RATIO_TITLE = r"$\|B\epsilon_A + \epsilon_B A\|_F \,/\, \|\epsilon_B \epsilon_A\|_F$"
ROLES = {
    "primary": ("primary, to its final", "tab:red"),
    "auxiliary": ("auxiliary, to its final", "tab:blue"),
    CROSS: ("auxiliary, to the primary's final", "tab:green"),
}
STYLES = {"product": ("B A", "-"), "factors": ("A and B as one vector", "--")}


def groups_with(result: Result, metric: str) -> list[str]:
    """The groups that have a curve of a metric."""
    return [group for group in result.groups if result.curve(group, metric)]


def draw(result: Result, folder: Path) -> list[str]:
    """Write the pictures that these runs allow; returns their names."""
    drawn = ["figA2_convergence.png"]
    _convergence(result, folder / drawn[0])
    if sam := groups_with(result, FIRST_ORDER):
        drawn = ["fig2_lora_sam.png", "figA4_layers.png", *drawn]
        _lora_sam(result, sam, folder / drawn[0])
        _layers(result, sam, folder / drawn[1])
    if dual := groups_with(result, COSINE):
        drawn.append("auxiliary.png")
        _auxiliary(result, dual, folder / drawn[-1])
    return drawn


def _where(result: Result) -> str:
    layer = result.settings["layer"]
    return "all layers" if layer == ALL else wrapped(layer)


def _lora_sam(result: Result, groups: Sequence[str], path: Path) -> None:
    """Figure 2: one row for each group."""
    with canvas(path, len(groups), 3) as (_, axes):
        for row, group in zip(axes, groups, strict=True):
            _terms(row[0], result, group)
            finish(row[0], f"{group}: norms of Eq. 5, {_where(result)}", "Frobenius norm")
            _ratio(row[1], result, group)
            finish(row[1], RATIO_TITLE, "ratio")
            for name, color in (("A", "tab:blue"), ("B", "tab:red")):
                line(row[2], result.curve(group, f"primary/{name}"), color, name)
            finish(row[2], "cosine to the final weights", "cosine")


def _layers(result: Result, groups: Sequence[str], path: Path) -> None:
    """Figure A4: norms above, ratio below, one column for each layer; groups one under another."""
    layers = {
        group: list(dict.fromkeys(s.item for s in result.summaries if s.group == group and s.item))
        for group in groups
    }
    with canvas(path, 2 * len(groups), max(map(len, layers.values()))) as (_, axes):
        for axis in axes.flat:
            axis.set_axis_off()
        for number, group in enumerate(groups):
            for column, layer in enumerate(layers[group]):
                above, below = axes[2 * number][column], axes[2 * number + 1][column]
                above.set_axis_on()
                below.set_axis_on()
                first = column == 0
                _terms(above, result, group, layer)
                finish(above, wrapped(layer), "Frobenius norm" if first else "", legend=first)
                _ratio(below, result, group, layer)
                finish(below, f"{group}: ratio of Fig. 2b", RATIO_TITLE if first else "")


def _terms(axis: Any, result: Result, group: str, layer: str = "") -> None:
    for name, (label, color) in TERM_LOOKS.items():
        line(axis, positive(result.curve(group, name, layer)), color, label)
    axis.set_yscale("log")


def _ratio(axis: Any, result: Result, group: str, layer: str = "") -> None:
    line(axis, positive(result.curve(group, RATIO, layer)), "tab:purple")
    axis.set_yscale("log")


def positive(curve: Sequence[Summary]) -> list[Summary]:
    """What a logarithmic axis can show: zeros become gaps, bands end above zero."""
    return [
        replace(point, error=min(point.error, 0.99 * point.mean))
        if point.mean and point.error is not None
        else replace(point, mean=None, error=None)
        for point in curve
    ]


def _convergence(result: Result, path: Path) -> None:
    """Figure A2: one panel for each group."""
    groups = result.groups
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    with canvas(path, rows, columns, sharey=True) as (_, axes):
        panels = list(axes.flat)
        for axis in panels[len(groups) :]:
            axis.set_axis_off()
        for axis, group in zip(panels, groups, strict=False):
            for role, (label, color) in ROLES.items():
                for quantity, (_, style) in STYLES.items():
                    curve = result.curve(group, f"{role}/{quantity}")
                    if curve:
                        line(axis, curve, color, label if quantity == "product" else None, ls=style)
            for of, style in STYLES.values():
                axis.plot([], [], color="gray", ls=style, label=of)
            axis.axhline(0, color="black", lw=0.6)
            title = f"{group}\n{_rates(result, group)}{_where(result)}"
            finish(axis, title, "cosine", legend=False)
        legend_below(panels, ncols=5 if columns > 2 else 2)


def _rates(result: Result, group: str) -> str:
    options = result.settings["options"][group]
    first, second = options["learning_rate"], options.get("auxiliary_learning_rate")
    return "" if second is None else rf"$\eta_1$ {first:g}, $\eta_2$ {second:g}, "


def _auxiliary(result: Result, groups: Sequence[str], path: Path) -> None:
    """Overlap of the subspaces, cosine of the products, ascent gain, and norm against rho."""
    colors = looks(groups)
    with canvas(path, 2, 2) as (_, axes):
        overlap, cosine, gain, norm = axes.flat
        for group in groups:
            color = colors[group]["color"]
            for name, style in ((COLUMNS, "-"), (ROWS, "--")):
                line(overlap, result.curve(group, name), color, ls=style)
                if chance := result.summary(group, f"chance {name}"):
                    overlap.axhline(chance.mean, color="gray", lw=0.8, ls=style)
            line(cosine, result.curve(group, COSINE), color, group)
            line(gain, result.curve(group, GAIN), color)
            for name, style in (("auxiliary_norm", "-"), ("auxiliary_norm_before", ":")):
                line(norm, result.curve(group, name), color, ls=style)
            rho = result.settings["options"][group].get("rho")
            if isinstance(rho, int | float):  # one that sets itself is logged, step by step
                norm.axhline(rho, color="black", lw=0.8, ls="--")
        for label, style in (("Col(B)", "-"), ("Row(A)", "--")):
            overlap.plot([], [], color="black", ls=style, label=f"{label} of both")
        overlap.plot([], [], color="gray", label="random subspaces")
        overlap.set_ylim(bottom=0)
        for label, style in (("after projection", "-"), ("before", ":"), ("rho", "--")):
            norm.plot([], [], color="black", ls=style, label=label)
        norm.set_yscale("log")
        cosine.axhline(0, color="black", lw=0.6)
        gain.axhline(0, color="black", lw=0.6)
        legend_below((cosine, overlap), ncols=2)
        title = f"mean squared cosine of principal angles, {_where(result)}"
        finish(overlap, title, "overlap", legend=False)
        finish(cosine, "cosine of B1 A1 and B2 A2", "cosine", legend=False)
        finish(gain, r"first-order ascent gain $\langle G, s_2 B_2 A_2 \rangle$", "loss")
        finish(norm, r"$\|s_2 B_2 A_2\|_F$ of all layers against rho", "norm")
