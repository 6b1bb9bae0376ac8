"""Figures 2, A2 and A4 of the paper, one of the auxiliary's curve, and tables of key figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bilora_diffusion.train.dynamics import COLUMNS, COSINE, FIRST_ORDER, GAIN, RATIO, ROWS, TERMS

from ..plot import Curve, Panel, wrapped
from ..report import Column
from ..table import Metric, Result
from .curves import CROSS, NEGLIGIBLE

TERM_LOOKS = {
    r"$\|B\epsilon_A\|_F$": "tab:red",
    r"$\|\epsilon_B A\|_F$": "tab:blue",
    r"$\|\epsilon_B \epsilon_A\|_F$": "tab:green",
}
"""Label and color of each of the `TERMS`."""
RATIO_TITLE = r"$\|B\epsilon_A + \epsilon_B A\|_F \,/\, \|\epsilon_B \epsilon_A\|_F$"
ROLES = {
    "primary": ("primary", "tab:red"),
    "auxiliary": ("auxiliary", "tab:blue"),
    CROSS: ("auxiliary to the primary's", "tab:green"),
}
QUANTITIES = {"product": "B A", "factors": "A and B", "A": "A", "B": "B"}


def metrics() -> dict[str, Metric]:
    """Titles and forms of the key figures."""
    titles = {
        f"settled {who}/{what}": f"{title} settled"
        for who in ("primary", "auxiliary")
        for what, title in QUANTITIES.items()
    }
    titles |= {f"{what} {RATIO}": f"ratio, {what} step" for what in ("lowest", "median", "highest")}
    titles |= {
        "lag product": "steps after the primary's B A",
        "layer_ratio": "median single layer",
        f"final {COLUMNS}": "Col(B) overlap",
        f"chance {COLUMNS}": "of random ones",
        f"final {ROWS}": "Row(A) overlap",
        f"chance {ROWS}": "of random ones",
        f"final {COSINE}": "cosine of B A",
        f"largest {CROSS}/product": "largest cosine to the primary's final B A",
        f"largest {CROSS}/factors": "the same of A and B",
        f"mean {GAIN}": "ascent gain, mean over steps",
    }
    percent = {"scale": 100, "form": ".0f"}
    return {name: Metric(title, higher_is_better=None) for name, title in titles.items()} | {
        "start primary/A": Metric("A at start", form=".2f"),
        "start auxiliary/A": Metric("A at start", form=".2f"),
        "share product": Metric("% of the steps before it", **percent),
        "layers_above": Metric(f"% of layers above {NEGLIGIBLE:.0f}", **percent),
    }


def columns(result: Result) -> dict[str, list[Column]]:
    """The tables."""
    steps = " or ".join(map(str, sorted(set(result.settings["steps"].values()))))
    ratios = [f"{what} {RATIO}" for what in ("lowest", "median", "highest")]
    overlaps = [f"{what} {side}" for side in (COLUMNS, ROWS) for what in ("final", "chance")]
    cross = [f"largest {CROSS}/{what}" for what in ("product", "factors")]
    tables = {
        f"Primary, of {steps} steps": [*_settled("primary"), "start primary/A"],
        f"Auxiliary, of {steps} steps": [
            *_settled("auxiliary"),
            *("start auxiliary/A", "lag product", "share product"),
        ],
        "LoRA-SAM: terms of Eq. 5": [*ratios, "layer_ratio", "layers_above"],
        "Primary and auxiliary": [*overlaps, f"final {COSINE}", *cross, f"mean {GAIN}"],
    }
    known = {line.metric for line in result.summaries}
    return {
        title: [Column(name) for name in names]
        for title, names in tables.items()
        if names[0] in known
    }


def _settled(who: str) -> list[str]:
    return [f"settled {who}/{what}" for what in QUANTITIES]


def panels(result: Result) -> dict[str, list[list[Panel]]]:
    """The pictures that these runs allow."""
    sam, dual = (
        [group for group in result.groups if result.curve(group, metric)]
        for metric in (FIRST_ORDER, COSINE)
    )
    drawn = {
        "fig2_lora_sam.png": [_lora_sam(result, group) for group in sam],
        "figA4_layers.png": [row for group in sam for row in _layers(result, group)],
        "figA2_convergence.png": _convergence(result),
        "auxiliary.png": _auxiliary(result, dual) if dual else [],
    }
    return {name: rows for name, rows in drawn.items() if rows}


def _terms(group: str, title: str, layer: str = "") -> Panel:
    looks = zip(TERMS, TERM_LOOKS.items(), strict=True)
    curves = [Curve(group, name, layer, *look) for name, look in looks]
    return Panel(title, "Frobenius norm", curves, log=True)


def _ratio(group: str, title: str, layer: str = "") -> Panel:
    return Panel(title, RATIO_TITLE, [Curve(group, RATIO, layer, color="tab:purple")], log=True)


def _lora_sam(result: Result, group: str) -> list[Panel]:
    """Figure 2."""
    colors = {"A": "tab:blue", "B": "tab:red"}.items()
    curves = [Curve(group, f"primary/{name}", "", name, color) for name, color in colors]
    return [
        _terms(group, f"{group}: norms of Eq. 5, all layers"),
        _ratio(group, "their ratio"),
        Panel("cosine to the final weights", "cosine", curves),
    ]


def _layers(result: Result, group: str) -> list[list[Panel]]:
    """Figure A4: norms above, ratio below, one column for each layer."""
    layers = dict.fromkeys(s.item for s in result.summaries if s.group == group and s.item)
    return [
        [_terms(group, wrapped(layer), layer) for layer in layers],
        [_ratio(group, f"{group}: ratio of Fig. 2b", layer) for layer in layers],
    ]


def _convergence(result: Result) -> list[list[Panel]]:
    """Figure A2: one panel for each group, three in a row."""
    styles = {"product": "-", "factors": "--"}
    drawn = []
    for group in result.groups:
        curves = [
            Curve(group, f"{role}/{what}", "", f"{label}, {QUANTITIES[what]}", color, style)
            for role, (label, color) in ROLES.items()
            for what, style in styles.items()
            if result.curve(group, f"{role}/{what}")
        ]
        title = f"{group}\n{_rates(result, group)}all layers"
        drawn.append(Panel(title, "cosine to the final weights", curves, levels=[0]))
    return [drawn[start : start + 3] for start in range(0, len(drawn), 3)]


def _rates(result: Result, group: str) -> str:
    options = result.settings["options"][group]
    first, second = options["learning_rate"], options.get("auxiliary_learning_rate")
    return "" if second is None else rf"$\eta_1$ {first:g}, $\eta_2$ {second:g}, "


def _auxiliary(result: Result, groups: Sequence[str]) -> list[list[Panel]]:
    """Overlap of the subspaces, cosine of the products, ascent gain, and norm against rho."""
    options: Mapping[str, Any] = result.settings["options"]
    rhos = [options[group].get("rho") for group in groups]
    chances = [
        result.summary(group, f"chance {side}") for group in groups for side in (COLUMNS, ROWS)
    ]

    def curves(*names: str, labelled: bool = False) -> list[Curve]:
        styles = dict(zip(names, ("-", "--"), strict=False))
        return [
            Curve(group, name, "", group if labelled else "", "", style)
            for group in groups
            for name, style in styles.items()
        ]

    overlap = "overlap, Col(B) solid, Row(A) dashed, random dotted\nall layers"
    angles = "mean squared cosine of principal angles"
    random = [line.mean for line in chances if line is not None and line.mean is not None]
    gain = r"first-order ascent gain $\langle G, s_2 B_2 A_2 \rangle$"
    norm = r"$\|s_2 B_2 A_2\|_F$ : projected solid, before dashed"
    norms = curves("auxiliary_norm", "auxiliary_norm_before")
    radii = [rho for rho in rhos if isinstance(rho, int | float)]
    cosines = curves(COSINE, labelled=True)
    return [
        [
            Panel(overlap, angles, curves(COLUMNS, ROWS), levels=random),
            Panel("cosine of B1 A1 and B2 A2", "cosine", cosines, levels=[0]),
        ],
        [
            Panel(gain, "loss", curves(GAIN), levels=[0]),
            Panel(norm, "norm", norms, log=True, levels=radii),
        ],
    ]
