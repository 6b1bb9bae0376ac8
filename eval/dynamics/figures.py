"""The paper's Figures 2, A2 and A4, a figure on the auxiliary, and tables of key figures."""

from __future__ import annotations

from collections.abc import Sequence

from bilora_diffusion.train.dynamics import COLUMNS, COSINE, FIRST_ORDER, GAIN, RATIO, ROWS, TERMS

from ..results.plot import Curve, Panel, wrap_name
from ..results.report import Column
from ..results.table import Metric, Result
from .curves import CROSS, NEGLIGIBLE

# Label -> color, for the `TERMS` of Eq. 5 in this order
TERM_COLORS = {
    r"$\|B\epsilon_A\|_F$": "tab:red",
    r"$\|\epsilon_B A\|_F$": "tab:blue",
    r"$\|\epsilon_B \epsilon_A\|_F$": "tab:green",
}
RATIO_TITLE = r"$\|B\epsilon_A + \epsilon_B A\|_F \,/\, \|\epsilon_B \epsilon_A\|_F$"
# Prefix of a cosine's name -> label and color in Figure A2
ROLES = {
    "primary": ("primary", "tab:red"),
    "auxiliary": ("auxiliary", "tab:blue"),
    CROSS: ("auxiliary with the primary's", "tab:green"),
}
# Quantity -> title
QUANTITIES = {"product": "B A", "factors": "A and B", "A": "A", "B": "B"}


def metrics() -> dict[str, Metric]:
    """Return titles and formats of the key figures."""
    titles = {}
    for adapter in ("primary", "auxiliary"):
        for quantity, title in QUANTITIES.items():
            titles[f"settled {adapter}/{quantity}"] = f"{title} settled at step"
    for figure in ("lowest", "median", "highest"):
        titles[f"{figure} {RATIO}"] = f"{figure} ratio over steps"
    titles |= {
        "lag product": "steps after the primary's B A",
        "layer_ratio": "median ratio over layers",
        f"final {COLUMNS}": "Col(B) overlap",
        f"chance {COLUMNS}": "random Col(B) overlap",
        f"final {ROWS}": "Row(A) overlap",
        f"chance {ROWS}": "random Row(A) overlap",
        f"final {COSINE}": "cosine of B1 A1 and B2 A2",
        f"largest {CROSS}/product": "largest cosine with the primary's final B A",
        f"largest {CROSS}/factors": "largest cosine with the primary's final A and B",
        f"mean {GAIN}": "ascent gain, mean over steps",
    }
    metrics = {name: Metric(title, higher_is_better=None) for name, title in titles.items()}
    metrics["start primary/A"] = Metric("A at start", form=".2f")
    metrics["start auxiliary/A"] = Metric("A at start", form=".2f")
    above_title = f"% of layers with a ratio above {NEGLIGIBLE:.0f}"
    metrics["share product"] = Metric("% of all steps until B A settled", scale=100, form=".0f")
    metrics["layers_above"] = Metric(above_title, scale=100, form=".0f")
    return metrics


def columns(result: Result) -> dict[str, list[Column]]:
    """Return the columns of each table by title, for tables whose first metric was measured."""
    steps = " or ".join(map(str, sorted(set(result.settings["steps"].values()))))
    primary = [f"settled primary/{quantity}" for quantity in QUANTITIES]
    primary.append("start primary/A")
    auxiliary = [f"settled auxiliary/{quantity}" for quantity in QUANTITIES]
    auxiliary += ["start auxiliary/A", "lag product", "share product"]
    tables = {
        f"Primary ({steps} steps)": primary,
        f"Auxiliary ({steps} steps)": auxiliary,
        "LoRA-SAM: terms of Eq. 5": [
            f"lowest {RATIO}",
            f"median {RATIO}",
            f"highest {RATIO}",
            "layer_ratio",
            "layers_above",
        ],
        "Primary and auxiliary": [
            f"final {COLUMNS}",
            f"chance {COLUMNS}",
            f"final {ROWS}",
            f"chance {ROWS}",
            f"final {COSINE}",
            f"largest {CROSS}/product",
            f"largest {CROSS}/factors",
            f"mean {GAIN}",
        ],
    }
    measured = {line.metric for line in result.summaries}
    columns_by_title = {}
    for title, names in tables.items():
        if names[0] in measured:
            columns_by_title[title] = [Column(name) for name in names]
    return columns_by_title


def panels(result: Result) -> dict[str, list[list[Panel]]]:
    """Return the rows of panels of each picture, by the picture's name.

    Figures 2 and A4 need a LoRA-SAM run, and the figure on the auxiliary needs a Bi-LoRA run.
    """
    sam_rows, layer_rows = [], []
    groups_with_auxiliary = []
    for group in result.groups:
        if result.curve(group, FIRST_ORDER):  # recorded by LoRA-SAM only
            sam_rows.append(_lora_sam(group))
            layer_rows += _layers(result, group)
        if result.curve(group, COSINE):
            groups_with_auxiliary.append(group)
    pictures: dict[str, list[list[Panel]]] = {}
    if sam_rows:
        pictures["fig2_lora_sam.png"] = sam_rows
        pictures["figA4_layers.png"] = layer_rows
    pictures["figA2_convergence.png"] = _convergence(result)
    if groups_with_auxiliary:
        pictures["auxiliary.png"] = _auxiliary(result, groups_with_auxiliary)
    return pictures


def _terms(group: str, title: str, layer: str = "") -> Panel:
    """Return a panel with the norms of Eq. 5's three terms, for a layer or ("") for all layers."""
    curves = []
    for name, (label, color) in zip(TERMS, TERM_COLORS.items(), strict=True):
        curves.append(Curve(group, name, layer, label, color))
    return Panel(title, "Frobenius norm", curves, log=True)


def _ratio(group: str, title: str, layer: str = "") -> Panel:
    """Return a panel with the ratio of Eq. 5's terms, for a layer or ("") for all layers."""
    return Panel(title, RATIO_TITLE, [Curve(group, RATIO, layer, color="tab:purple")], log=True)


def _lora_sam(group: str) -> list[Panel]:
    """Return the panels of Figure 2 for one group."""
    curves = [
        Curve(group, "primary/A", label="A", color="tab:blue"),
        Curve(group, "primary/B", label="B", color="tab:red"),
    ]
    return [
        _terms(group, f"{group}: norms of Eq. 5, all layers"),
        _ratio(group, "ratio of Eq. 5's terms"),
        Panel("cosine with the final weights", "cosine", curves),
    ]


def _layers(result: Result, group: str) -> list[list[Panel]]:
    """Return Figure A4 for one group: norms above ratios, with a column for each layer."""
    items = [line.item for line in result.summaries if line.group == group]
    layers = [item for item in dict.fromkeys(items) if item]
    return [
        [_terms(group, wrap_name(layer), layer) for layer in layers],
        [_ratio(group, f"{group}: ratio of Fig. 2b", layer) for layer in layers],
    ]


def _convergence(result: Result) -> list[list[Panel]]:
    """Return Figure A2: a panel for each group, three in a row."""
    styles = {"product": "-", "factors": "--"}
    group_panels = []
    for group in result.groups:
        curves = []
        for role, (role_label, color) in ROLES.items():
            for quantity, style in styles.items():
                metric = f"{role}/{quantity}"
                label = f"{role_label}, {QUANTITIES[quantity]}"
                if result.curve(group, metric):
                    curves.append(Curve(group, metric, "", label, color, style))
        title = f"{group}\n{_rates(result, group)}all layers"
        group_panels.append(Panel(title, "cosine with the final weights", curves, lines=[0]))
    return [group_panels[start : start + 3] for start in range(0, len(group_panels), 3)]


def _rates(result: Result, group: str) -> str:
    """Return both learning rates as a part of a title; "" without an auxiliary."""
    options = result.settings["options"][group]
    rate, auxiliary_rate = options["learning_rate"], options.get("auxiliary_learning_rate")
    if auxiliary_rate is None:
        return ""
    return rf"$\eta_1$ {rate:g}, $\eta_2$ {auxiliary_rate:g}, "


def _auxiliary(result: Result, groups: Sequence[str]) -> list[list[Panel]]:
    """Return panels on the auxiliary: subspace overlap, cosine of products, ascent gain, norm."""
    overlaps, norms, cosines, gains = [], [], [], []
    chances, radii = [], []  # horizontal lines
    for group in groups:
        for side in (COLUMNS, ROWS):
            line = result.summary(group, f"chance {side}")
            if line is not None and line.mean is not None:
                chances.append(line.mean)
        rho = result.settings["options"][group].get("rho")
        if isinstance(rho, int | float):
            radii.append(rho)
        overlaps.append(Curve(group, COLUMNS, style="-"))
        overlaps.append(Curve(group, ROWS, style="--"))
        norms.append(Curve(group, "auxiliary_norm", style="-"))
        norms.append(Curve(group, "auxiliary_norm_before", style="--"))
        cosines.append(Curve(group, COSINE, label=group, style="-"))
        gains.append(Curve(group, GAIN, style="-"))
    overlap_title = "overlap, Col(B) solid, Row(A) dashed, random dotted\nall layers"
    overlap_label = "mean squared cosine of principal angles"
    gain_title = r"first-order ascent gain $\langle G, s_2 B_2 A_2 \rangle$"
    norm_title = r"$\|s_2 B_2 A_2\|_F$ : after projection solid, before it dashed"
    upper_row = [
        Panel(overlap_title, overlap_label, overlaps, lines=chances),
        Panel("cosine of B1 A1 and B2 A2", "cosine", cosines, lines=[0]),
    ]
    lower_row = [
        Panel(gain_title, "loss", gains, lines=[0]),
        Panel(norm_title, "norm", norms, log=True, lines=radii),
    ]
    return [upper_row, lower_row]
