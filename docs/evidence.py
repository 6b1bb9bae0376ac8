"""The tables of results/README.md: each claim, its measured figures and the verdict.

`claims.yaml` names the claims and their results. Figures and verdicts are computed from
``results/``.
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

from bilora_diffusion.core.statistics import mean_interval
from eval.results.compare import ITEM, SEED, mean, units
from eval.results.report import table
from eval.results.table import read

ROOT = Path(__file__).resolve().parents[1]
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
# All differences are exactly 0, so the figure says nothing about the claim.
NO_DIFFERENCE = "no difference at all"


@dataclass(frozen=True)
class Check:
    """A figure that supports or contradicts a claim, and the bounds that the claim sets for it."""

    title: str
    # Result folder of an `eval` command, or JSON file of ``benchmarks/step_cost.py``
    result: str
    # Group in the result, or variant in the benchmark
    group: str
    # Metric in the result, or field of the variant
    metric: str
    # Item of the metric; "each" takes values by item instead of by seed
    item: str = ""
    # Group whose values are subtracted, pair by pair; "" to use the values themselves
    control: str = ""
    # Item of the control; "" for the same item
    control_item: str = ""
    # Metric of the same group whose values are subtracted instead of a control's
    minus: str = ""
    # Item of the same group whose values are subtracted instead of a control's
    minus_item: str = ""
    # Step of a metric over training; None for a metric of the whole run
    step: int | None = None
    # Bounds that the claim sets for the figure, both exclusive
    upper: float = inf
    lower: float = -inf
    # Bound of the figure's absolute value, as a share of the control's absolute mean
    tolerance: float | None = None


@dataclass(frozen=True)
class Claim:
    """A claim of the paper (C1 to C13), or a finding of this project (F10 to F19)."""

    name: str
    # The claim as a sentence
    says: str
    # Place in the paper; for a finding, how it was measured
    where: str
    command: str
    checks: Sequence[Check]


@dataclass(frozen=True)
class Figure:
    """A mean with its 95 % interval.

    For a benchmark it is a median of ratios, or a single ratio, which is both ends of the interval.
    """

    mean: float
    low: float
    high: float
    count: int
    # Absolute mean of the subtracted values (1 without them); tolerances are shares of it
    size: float


def figure(check: Check) -> Figure:
    """Compute the figure of a check.

    Raises:
        ValueError: The result has no such group or metric, or no interval.
        KeyError: The benchmark has no such variant or value.
    """
    path = ROOT / check.result
    if path.suffix == ".json":  # a benchmark, which has no rows
        return _benchmark(check, json.loads(path.read_text(encoding="utf-8"))["variants"])
    result = read(path)
    unit = ITEM if check.item == "each" else SEED

    def values_of(metric: str, group: str, item: str) -> dict[Any, float]:
        """Return a group's values by item or by seed."""
        rows = result.select(metric, item=None if item == "each" else item)
        if check.step is not None:
            rows = [row for row in rows if row.step == check.step]
        values = units(rows, unit).get(group, {})
        return {key: value for key, value in values.items() if value is not None}

    values = values_of(check.metric, check.group, check.item)
    # Subtract another metric or item of the same group, or the control's metric.
    if check.minus or check.minus_item:
        metric, item = check.minus or check.metric, check.minus_item or check.item
        control_values = values_of(metric, check.group, item)
    else:
        control_values = values_of(check.metric, check.control, check.control_item or check.item)
    if check.control or check.minus or check.minus_item:
        differences = {}
        for key, value in values.items():
            if key in control_values:
                differences[key] = value - control_values[key]
        values = differences
    interval = mean_interval(list(values.values())) if values else None
    if interval is None:
        raise ValueError(f"{check.result} has no interval for {check.metric} of {check.group}.")
    size = 1.0
    if control_values:
        size = abs(mean(list(control_values.values())))
    low, high = interval
    return Figure(mean(list(values.values())), low, high, len(values), size)


def _benchmark(check: Check, variants: dict[str, Any]) -> Figure:
    """Return the figure of a benchmark's variant, as a ratio to plain LoRA."""
    variant = variants[check.group]
    if check.metric == "ratio_to_lora":
        low, high = variant["ratio_interval_95"]
        return Figure(variant[check.metric], low, high, len(variant["seconds"]), size=1.0)
    # A figure that is measured once, such as memory, has no interval.
    ratio = variant[check.metric] / variants["lora"][check.metric]
    return Figure(ratio, ratio, ratio, count=1, size=1.0)


def verdict(check: Check, figure: Figure) -> str:
    """Return the verdict on a check.

    It is `HOLDS` if the whole interval is within the bounds, `FAILS` if the whole interval is
    outside, `NO_DIFFERENCE` if all differences are 0 and 0 is a bound, and otherwise `OPEN`.
    """
    lower, upper = check.lower, check.upper
    if check.tolerance is not None:
        # A tolerance is the same in both directions.
        upper = check.tolerance * figure.size
        lower = -upper
    elif figure.low == figure.high == 0 and 0 in (lower, upper):
        return NO_DIFFERENCE
    if lower < figure.low and figure.high < upper:
        return HOLDS
    if figure.high <= lower or figure.low >= upper:
        return FAILS
    return OPEN


def overall(verdicts: Sequence[str]) -> str:
    """Return the common verdict of a claim's checks, or the number of checks with each verdict."""
    different_verdicts = list(dict.fromkeys(verdicts))
    if len(different_verdicts) == 1:
        return different_verdicts[0]
    counts = []
    for word in different_verdicts:
        counts.append(f"{verdicts.count(word)} of {len(verdicts)}: {word}")
    return ", ".join(counts)


def claims() -> list[Claim]:
    """Read the claims of `claims.yaml`."""
    entries = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
    return TypeAdapter(list[Claim]).validate_python(entries)


def page() -> Iterable[str]:
    """Generate the page below its introduction: tables of verdicts, then each claim's figures."""
    # Rows of the paper's claims ("C") and of our findings ("F")
    rows: dict[str, list[tuple[str, ...]]] = {"C": [], "F": []}
    sections = []
    for claim in claims():
        lines = []
        verdicts = []
        for check in claim.checks:
            check_figure = figure(check)
            check_verdict = verdict(check, check_figure)
            verdicts.append(check_verdict)
            lines.append(_line(check, check_figure, check_verdict))
        rows[claim.name[0]].append((claim.name, claim.says, f"**{overall(verdicts)}**"))
        heads = ("figure", "result", "value, 95 % interval", "n", "the claim says", "verdict")
        sections += [
            f"### {claim.name}: {claim.says}",
            f"{claim.where}. Verdict: **{overall(verdicts)}**.",
            table(heads, lines),
            f"```bash\n{claim.command.strip()}\n```",
        ]
    return [
        table(("claim", "what the paper says", "verdict"), rows["C"]),
        table(("finding", "what was found here", "verdict"), rows["F"]),
        *sections,
    ]


def _line(check: Check, figure: Figure, result: str) -> tuple[str, ...]:
    """Return the row of a check in its claim's table."""
    number = f"{figure.mean:.4g} ({figure.low:.4g} to {figure.high:.4g})"
    if check.tolerance is not None:
        bound = f"at most {check.tolerance:.0%} of the control's mean, either way"
    elif check.upper < inf:
        bound = f"below {check.upper:g}"
    else:
        bound = f"above {check.lower:g}"
    return check.title, f"`{check.result}`", number, str(figure.count), bound, result
