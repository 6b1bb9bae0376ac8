"""Figures 2, A2 and A4 of the paper for recorded runs, and one of the auxiliary's own course."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

from .bands import Curve
from .courses import ALL, CROSS
from .dynamics_result import DynamicsResult, GroupDynamics, LayerCurves
from .pictures import canvas, finish, legend_below, line, wrapped

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


def draw(result: DynamicsResult, folder: Path) -> list[str]:
    """Write the pictures that these runs allow; returns their names."""
    sam = [group for group in result.groups if FIRST_ORDER in group.curves]
    dual = [group for group in result.groups if COSINE in group.curves]
    drawn = ["figA2_convergence.png"]
    _convergence(result.groups, result.layer, folder / drawn[0])
    if sam:
        drawn = ["fig2_lora_sam.png", "figA4_layers.png", *drawn]
        _lora_sam(sam, result.layer, folder / drawn[0])
        _layers(result.layers, folder / drawn[1])
    if dual:
        drawn.append("auxiliary.png")
        _auxiliary(dual, result.layer, folder / drawn[-1])
    return drawn


def _where(layer: str) -> str:
    return "all layers" if layer == ALL else wrapped(layer)


def _lora_sam(groups: Sequence[GroupDynamics], layer: str, path: Path) -> None:
    """Figure 2: one row for each group."""
    with canvas(path, len(groups), 3) as axes:
        for row, group in zip(axes, groups, strict=True):
            _terms(row[0], group.curves)
            finish(row[0], f"{group.label}: norms of Eq. 5, {_where(layer)}", "Frobenius norm")
            _ratio(row[1], group.curves)
            finish(row[1], RATIO_TITLE, "ratio")
            for name, color in (("A", "tab:blue"), ("B", "tab:red")):
                line(row[2], group.curves[f"primary/{name}"], color, name)
            finish(row[2], "cosine to the final weights", "cosine")


def _layers(layers: Sequence[LayerCurves], path: Path) -> None:
    """Figure A4: norms above, ratio below, one column for each layer; groups one under another."""
    groups = list(dict.fromkeys(entry.group for entry in layers))
    columns = max(sum(entry.group == group for entry in layers) for group in groups)
    with canvas(path, 2 * len(groups), columns) as axes:
        for number, group in enumerate(groups):
            own = [entry for entry in layers if entry.group == group]
            for column in range(columns):
                above, below = axes[2 * number][column], axes[2 * number + 1][column]
                if column >= len(own):
                    above.set_axis_off()
                    below.set_axis_off()
                    continue
                entry = own[column]
                _terms(above, entry.curves)
                finish(
                    above,
                    wrapped(entry.layer),
                    "Frobenius norm" if column == 0 else "",
                    legend=column == 0,
                )
                _ratio(below, entry.curves)
                finish(below, f"{group}: ratio of Fig. 2b", RATIO_TITLE if column == 0 else "")


def _terms(axis: Any, curves: Mapping[str, Curve]) -> None:
    for name, (label, color) in TERM_LOOKS.items():
        line(axis, _positive(curves[name]), color, label)
    axis.set_yscale("log")


def _ratio(axis: Any, curves: Mapping[str, Curve]) -> None:
    line(axis, _positive(curves[RATIO]), "tab:purple")
    axis.set_yscale("log")


def _positive(curve: Curve) -> Curve:
    """What a logarithmic axis can show: zeros become gaps, bands end above zero."""
    means = [value if value else None for value in curve.mean]
    errors = [
        None if m is None or e is None else min(e, 0.99 * m)
        for m, e in zip(means, curve.error, strict=True)
    ]
    return Curve(curve.steps, means, errors)


def _convergence(groups: Sequence[GroupDynamics], layer: str, path: Path) -> None:
    """Figure A2: one panel for each group."""
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    with canvas(path, rows, columns, sharey=True) as axes:
        panels = list(axes.flat)
        for axis in panels[len(groups) :]:
            axis.set_axis_off()
        for axis, group in zip(panels, groups, strict=False):
            for role, (said, color) in ROLES.items():
                for quantity, (_, style) in STYLES.items():
                    if (curve := group.curves.get(f"{role}/{quantity}")) is not None:
                        line(axis, curve, color, said if quantity == "product" else None, ls=style)
            for of, style in STYLES.values():
                axis.plot([], [], color="gray", ls=style, label=of)
            axis.axhline(0, color="black", lw=0.6)
            title = f"{group.label}\n{_rates(group)}{_where(layer)}"
            finish(axis, title, "cosine", legend=False)
        legend_below(panels, ncols=5 if columns > 2 else 2)


def _rates(group: GroupDynamics) -> str:
    second = group.options.get("auxiliary_learning_rate")
    if second is None:
        return ""
    first = group.options["learning_rate"]
    return rf"$\eta_1$ {first:g}, $\eta_2$ {second:g}, "


def _auxiliary(groups: Sequence[GroupDynamics], layer: str, path: Path) -> None:
    """Overlap of the subspaces, cosine of the products, ascent gain, and norm against rho."""
    import matplotlib

    colors = matplotlib.colormaps["tab10"]
    with canvas(path, 2, 2) as axes:
        overlap, cosine, gain, norm = axes.flat
        for number, group in enumerate(groups):
            color = colors(number % 10)
            for name, side, style in ((COLUMNS, "columns", "-"), (ROWS, "rows", "--")):
                line(overlap, group.curves[name], color, ls=style)
                overlap.axhline(group.chance[side], color="gray", lw=0.8, ls=style)
            line(cosine, group.curves[COSINE], color, group.label)
            if GAIN in group.curves:
                line(gain, group.curves[GAIN], color)
            for name, style in (("auxiliary_norm", "-"), ("auxiliary_norm_before", ":")):
                if name in group.curves:
                    line(norm, group.curves[name], color, ls=style)
            if group.options.get("rho") is not None:
                norm.axhline(group.options["rho"], color="black", lw=0.8, ls="--")
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
        title = f"mean squared cosine of principal angles, {_where(layer)}"
        finish(overlap, title, "overlap", legend=False)
        finish(cosine, "cosine of B1 A1 and B2 A2", "cosine", legend=False)
        finish(gain, r"first-order ascent gain $\langle G, s_2 B_2 A_2 \rangle$", "loss")
        finish(norm, r"$\|s_2 B_2 A_2\|_F$ of all layers against rho", "norm")
