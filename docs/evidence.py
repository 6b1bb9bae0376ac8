"""results/README.md: each claim of the paper, its measured figures and the verdict.

`claims.yaml` names the claims and their results; figures and verdicts are computed from
``results/``: none is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from eval.compare import ITEM, SEED, bootstrap_interval, mean, units
from eval.report import table
from eval.table import read

ROOT = Path(__file__).resolve().parents[1]
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Check:
    """One figure that speaks for or against a claim.

    Args:
        title: of the figure, for a reader.
        result: a folder that `eval` wrote, or a file of ``benchmarks/step_cost.py``.
        group: whose figure; in a benchmark the variant.
        metric, item: which; in a benchmark the field of a variant. The item "each" pairs by item.
        control: the group whose value is taken off, pair by pair; "" for the value itself.
        minus: the metric of the same group whose value is taken off instead.
        upper, lower: between which the claim says that the figure lies.
        tolerance: the largest size that it may have, as a share of the control's mean.
    """

    title: str
    result: str
    group: str
    metric: str
    item: str = ""
    control: str = ""
    minus: str = ""
    upper: float = inf
    lower: float = -inf
    tolerance: float | None = None


@dataclass(frozen=True)
class Claim:
    """C1 to C13 of the paper, F1 and so on of our own findings.

    Args:
        says: it, in a sentence.
        where: in the paper; what was done, of a finding.
        command: what measures it.
        checks: where to look for it.
    """

    name: str
    says: str
    where: str
    command: str
    checks: Sequence[Check]


@dataclass(frozen=True)
class Figure:
    """A mean, its 95 % interval, over how many it is, and the size that it is seen by."""

    mean: float
    low: float
    high: float
    count: int
    size: float


def figure(check: Check) -> Figure:
    """The figure that a check looks at.

    Raises:
        ValueError: the result has no such group or metric, or no interval.
    """
    path = ROOT / check.result
    if path.suffix == ".json":  # of a benchmark, which has no rows
        return _benchmark(check, json.loads(path.read_text(encoding="utf-8"))["arms"])
    result = read(path)
    over, item = (ITEM, None) if check.item == "each" else (SEED, check.item)

    def values_of(metric: str, group: str) -> dict[Any, float]:
        values = units(result.select(metric, item=item), over).get(group, {})
        return {unit: value for unit, value in values.items() if value is not None}

    values = values_of(check.metric, check.group)
    if check.minus:
        control_values = values_of(check.minus, check.group)
    else:
        control_values = values_of(check.metric, check.control)
    if check.control or check.minus:
        pairs = values.keys() & control_values.keys()
        values = {unit: values[unit] - control_values[unit] for unit in values if unit in pairs}
    # By the same bootstrap as in the results themselves.
    interval = bootstrap_interval(list(values.values())) if values else None
    if interval is None:
        raise ValueError(f"{check.result} has no interval for {check.metric} of {check.group}.")
    # What a tolerance is a share of.
    size = abs(mean(list(control_values.values()))) if control_values else 1.0
    return Figure(mean(list(values.values())), *interval, len(values), size)


def _benchmark(check: Check, arms: dict[str, Any]) -> Figure:
    arm, lora = arms[check.group], arms["lora"]
    if check.metric == "ratio_to_lora":
        low, high = arm["ratio_interval_95"]
        return Figure(arm[check.metric], low, high, len(arm["seconds"]), 1.0)
    ratio = arm[check.metric] / lora[check.metric]
    return Figure(ratio, ratio, ratio, 1, 1.0)


def verdict(check: Check, figure: Figure) -> str:
    """The verdict of the interval: where the claim has it, elsewhere, or partly there."""
    # A verdict needs the whole interval on one side.
    lower, upper = check.lower, check.upper
    if check.tolerance is not None:
        lower, upper = -check.tolerance * figure.size, check.tolerance * figure.size
    if lower < figure.low and figure.high < upper:
        return HOLDS
    return FAILS if figure.high <= lower or figure.low >= upper else OPEN


def overall(verdicts: Sequence[str]) -> str:
    """The verdict on a claim from those of its checks: what they agree in, or how they differ."""
    different = list(dict.fromkeys(verdicts))
    if len(different) == 1:
        return different[0]
    counts = [f"{verdicts.count(word)} of {len(verdicts)}: {word}" for word in different]
    return ", ".join(counts)


def claims() -> list[Claim]:
    """The claims as `claims.yaml` has them."""
    loaded = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
    return TypeAdapter(list[Claim]).validate_python(loaded)


def page() -> Iterable[str]:
    """The parts of the page after its head: tables of verdicts, then each claim's figures."""
    rows: dict[str, list[tuple[str, ...]]] = {"C": [], "F": []}
    sections = []
    for claim in claims():
        figures = [figure(check) for check in claim.checks]
        verdicts = [verdict(*pair) for pair in zip(claim.checks, figures, strict=True)]
        rows[claim.name[0]].append((claim.name, claim.says, f"**{overall(verdicts)}**"))
        sections += [
            f"### {claim.name}: {claim.says}",
            f"{claim.where}. Verdict: **{overall(verdicts)}**.",
            table(
                ("figure", "result", "value, 95 % interval", "n", "the claim says", "verdict"),
                map(_line, claim.checks, figures, verdicts),
            ),
            f"```bash\n{claim.command.strip()}\n```",
        ]
    return [
        table(("claim", "of the paper", "verdict"), rows["C"]),
        table(("finding", "of this project", "verdict"), rows["F"]),
        *sections,
    ]


def _line(check: Check, figure: Figure, result: str) -> tuple[str, ...]:
    number = f"{figure.mean:.4g} ({figure.low:.4g} to {figure.high:.4g})"
    if check.tolerance is not None:
        bound = f"at most {check.tolerance:.0%} of the control's"
    elif check.upper < inf:
        bound = f"below {check.upper:g}"
    else:
        bound = f"above {check.lower:g}"
    return check.title, f"`{check.result}`", number, str(figure.count), bound, result
