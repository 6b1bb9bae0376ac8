"""Tables of docs/results.md about flat minima."""

from __future__ import annotations

from collections.abc import Iterable

from eval.results import report
from eval.results.table import Metric, Result, Summary

from .tables import CONTROL, COSINE, LOSS, PAPER, cell, read, seeds

RHO_1 = "Bi-LoRA, rho 1"
# Condition in eval/experiments/flat_minima.yaml -> its title
CONDITIONS = {
    "guidance 4 (plain)": "as trained",
    "guidance 4 (int8)": "base weights in 8 bits",
    "guidance 4 (int4)": "4 bits",
    "guidance 4 (int3)": "3 bits",
    "guidance 4 (nf4)": "NF4",
    "guidance 4 (noise 0.2)": "noise on all weights",
    "guidance 4 (5 steps)": "5 sampler steps",
}
# Result -> title of its data, and item -> title
FLAT_RESULTS = {
    "flat_minima_duotone": ("icons in two colors", CONDITIONS),
    "flat_minima_animals": ("12 animals", CONDITIONS),
    "two_files": (
        "animals with a second file",
        {"guidance 4": "scale 4", "base's guidance 2": "base's guidance 2"},
    ),
}
VARIANTS = (PAPER, RHO_1, "LoRA-SAM")
# Labels of the groups in results/generalization and results/dynamics
GAPS = {"LoRA-SAM": "LoRA-SAM", PAPER: "Bi-LoRA (rho=0.05)", RHO_1: "Bi-LoRA (rho=1)"}
DYNAMICS = {
    PAPER: "Bi-LoRA (auxiliary_learning_rate=0.001, rho=0.05)",
    RHO_1: "Bi-LoRA (auxiliary_learning_rate=0.001, rho=1)",
}
PLAIN = Metric("a number", form=".0f")


def flatness() -> Iterable[str]:
    """Generate the table of the paper's figures on flatness and training dynamics."""
    landscape, gaps, dynamics = read("landscape"), read("generalization"), read("dynamics")
    no_value = report.NOT_AVAILABLE
    rows = []
    for metric, title in {
        "rise": "Fig. 3: rise of the loss along random directions of all weights, x 1000",
        "sharpness": "SAM's sharpness among all weights, x 1000",
    }.items():
        cells = [
            cell(landscape, landscape.summary(group, metric, "full"), LOSS)
            for group in (CONTROL, "LoRA-SAM", PAPER)
        ]
        rows.append((title, *cells, no_value))
    cells = [
        cell(gaps, gaps.summary(group, "final gap"), LOSS) for group in (CONTROL, *GAPS.values())
    ]
    rows.append(("Fig. A3: held-out minus training loss at the end, x 1000", *cells))
    ratio = dynamics.summary("LoRA-SAM", "median ratio")
    title = "Figs. 2, A4: ratio of the other terms of Eq. 5 to its third term (paper: 10,000)"
    rows.append((title, no_value, _with_interval(ratio), no_value, no_value))
    for adapter in ("primary", "auxiliary"):
        cells = [no_value, no_value]
        if adapter == "primary":
            cells = [
                _read_settled_step(dynamics, group, adapter) for group in (CONTROL, "LoRA-SAM")
            ]
        cells += [_read_settled_step(dynamics, group, adapter) for group in DYNAMICS.values()]
        title = f"Fig. A2: first step at which the {adapter}'s cosine to its final product is 0.9"
        rows.append((title, *cells))
    yield report.table(("figure of the paper", CONTROL, "LoRA-SAM", PAPER, RHO_1), rows)


def _read_settled_step(dynamics: Result, group: str, adapter: str) -> str:
    """Format the step (of 200) from which an adapter's product has nearly its final direction."""
    return _with_interval(dynamics.summary(group, f"settled {adapter}/product"))


def _with_interval(line: Summary | None) -> str:
    """Format a group's mean with its interval over seeds."""
    if line is None or line.interval is None:
        return report.NOT_AVAILABLE
    return f"{report.number(line.mean, PLAIN)} {report.interval(line.interval, PLAIN)}"


def flat_minima() -> Iterable[str]:
    """Generate the table of LoRA's sample scores and the other methods' differences from them."""
    rows = []
    for name, (data, items) in FLAT_RESULTS.items():
        result = read(name)
        first_cell = f"{data}, {seeds(result)}"
        for item, title in items.items():
            lines = [result.summary(group, "truth", item, 300) for group in (CONTROL, *VARIANTS)]
            rows.append((first_cell, title, *[cell(result, line, COSINE) for line in lines]))
            first_cell = ""
    yield report.table(("data, seeds", "sampled", CONTROL, *VARIANTS), rows)
