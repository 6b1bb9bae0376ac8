"""evidence.md: each claim of the paper, what was measured of it, and what that says.

`claims.yaml` names the claims and where to look; the figures come from ``results/``, and so do the
verdicts: none is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from eval.compare import ITEM, SEED, bootstrap_interval, mean, units
from eval.table import FILE, read

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = Path(__file__).with_name("claims.yaml")
HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "undecided", "not measured yet"
UNTESTED = "can't be tested here"


@dataclass(frozen=True)
class Check:
    """One figure that speaks for or against a claim.

    Args:
        what: it, for a reader.
        result: a folder that `eval` wrote, or a file of ``benchmarks/step_cost.py``.
        group: whose figure; in a benchmark the arm.
        metric, item: which; in a benchmark the field of an arm. The item "each" pairs by item.
        control: the group whose value is taken off, pair by pair; "" for the value itself.
        minus: the metric of the same group whose value is taken off instead.
        below, above: where the claim says that the figure lies.
        within: the largest size that it may have, as a share of the control's mean.
    """

    what: str
    result: str
    group: str
    metric: str
    item: str = ""
    control: str = ""
    minus: str = ""
    below: float | None = None
    above: float | None = None
    within: float | None = None


@dataclass(frozen=True)
class Claim:
    """One claim.

    Args:
        name: C1 to C13 of the paper, F1 and so on of our own findings.
        says: it, in a sentence.
        where: in the paper; what was done, of a finding.
        command: what measures it.
        checks: where to look for it.
        untested: why it can't be tested here, "" if it can.
    """

    name: str
    says: str
    where: str
    command: str
    checks: Sequence[Check] = ()
    untested: str = ""


@dataclass(frozen=True)
class Figure:
    """A mean, its 95 % interval, over how many it is, and the size that it is seen by."""

    mean: float
    low: float
    high: float
    count: int
    size: float


def figure(check: Check) -> Figure | None:
    """What a check looks at; None where it was not measured.

    Raises:
        ValueError: the result has no such group or metric, or no interval.
    """
    path = ROOT / check.result
    if not (path / FILE if path.suffix != ".json" else path).exists():
        return None
    if path.suffix == ".json":
        return _benchmark(check, json.loads(path.read_text(encoding="utf-8"))["arms"])
    result = read(path)
    over, item = (ITEM, None) if check.item == "each" else (SEED, check.item)
    values = units(result.select(check.metric, item=item), over)
    other = values.get(check.control, {})
    if check.minus:
        other = units(result.select(check.minus, item=item), over).get(check.group, {})
    own: dict[Any, float] = {
        unit: value for unit, value in values.get(check.group, {}).items() if value is not None
    }
    taken = {unit: value for unit, value in other.items() if value is not None}
    if check.control or check.minus:
        own = {unit: own[unit] - taken[unit] for unit in own if unit in taken}
    interval = bootstrap_interval(list(own.values())) if own else None
    if interval is None:
        raise ValueError(f"{check.result} has no interval for {check.metric} of {check.group}.")
    size = abs(mean(list(taken.values()))) if taken else 1.0
    return Figure(mean(list(own.values())), *interval, len(own), size)


def _benchmark(check: Check, arms: dict[str, Any]) -> Figure:
    own, lora = arms[check.group], arms["lora"]
    if check.metric == "ratio_to_lora":
        low, high = own["ratio_interval_95"]
        return Figure(own["ratio_to_lora"], low, high, len(own["seconds"]), 1.0)
    ratio = own[check.metric] / lora[check.metric]
    return Figure(ratio, ratio, ratio, 1, 1.0)


def verdict(check: Check, found: Figure | None) -> str:
    """What the interval says: it lies where the claim has it, elsewhere, or partly there."""
    if found is None:
        return MISSING
    if check.within is not None:
        bound = check.within * found.size
        low, high = -bound, bound
    else:
        low = float("-inf") if check.above is None else check.above
        high = float("inf") if check.below is None else check.below
    if low < found.low and found.high < high:
        return HOLDS
    return FAILS if found.high <= low or found.low >= high else OPEN


def overall(claim: Claim, verdicts: Sequence[str]) -> str:
    """The verdict on a claim from those of its checks: what they agree in, or how they differ."""
    if claim.untested:
        return UNTESTED
    known = [one for one in verdicts if one != MISSING]
    if not known:
        return MISSING
    different = list(dict.fromkeys(known))
    if len(different) == 1:
        return different[0]
    return ", ".join(f"{known.count(one)} of {len(known)}: {one}" for one in different)


def claims() -> list[Claim]:
    """The claims as `claims.yaml` has them."""
    loaded = yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))
    return TypeAdapter(list[Claim]).validate_python(loaded)


def page() -> Iterable[str]:
    """The parts of the page after its head: a table of verdicts, then each claim's figures."""
    rows: dict[str, list[tuple[str, ...]]] = {"C": [], "F": []}
    sections = []
    for claim in claims():
        found = [figure(check) for check in claim.checks]
        verdicts = [verdict(c, f) for c, f in zip(claim.checks, found, strict=True)]
        said = overall(claim, verdicts)
        rows[claim.name[0]].append((claim.name, claim.says, f"**{said}**"))
        sections += [
            f"### {claim.name}: {claim.says}",
            f"{claim.where}. Here: **{said}**"
            + (f", since {claim.untested}." if claim.untested else "."),
        ]
        if claim.checks:
            triples = zip(claim.checks, found, verdicts, strict=True)
            sections.append(table(_HEAD, (_line(c, f, v) for c, f, v in triples)))
        sections.append(f"```bash\n{claim.command.strip()}\n```")
    return [
        table(("claim", "of the paper", "here"), rows["C"]),
        table(("finding", "of ours", "here"), rows["F"]),
        *sections,
    ]


_HEAD = ("what", "where", "figure, 95 % interval", "over", "the claim asks for", "verdict")


def _line(check: Check, found: Figure | None, said: str) -> tuple[str, ...]:
    number, over = "", ""
    if found is not None:
        number, over = f"{found.mean:.4g} ({found.low:.4g} to {found.high:.4g})", str(found.count)
    if check.within is not None:
        asked = f"at most {check.within:.0%} of the control's"
    else:
        asked = f"below {check.below:g}" if check.below is not None else f"above {check.above:g}"
    return check.what, f"`{check.result}`", number, over, asked, said


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
