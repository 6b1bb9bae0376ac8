"""The report: the key figures, and what the paper says (Figs. 2 and A2) beside what these show."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from bilora_diffusion.train.dynamics import COLUMNS, COSINE, FIRST_ORDER, GAIN, RATIO, ROWS

from .. import compare
from .. import report as parts
from ..report import AGREES, DISAGREES, IN_PART, UNCLEAR, Claim, above, below, both
from ..table import Metric, Result, Summary
from .courses import ALL, CROSS, NEGLIGIBLE
from .figures import groups_with

LAST_FIFTH = 0.8
RAPID = 0.5
INDEPENDENT = 0.1
_OWN_RATE = "auxiliary_learning_rate"


def report(result: Result) -> str:
    """``report.md``."""
    layer = result.settings["layer"]
    where = "all layers as one vector" if layer == ALL else f"layer `{layer}`"
    return parts.page(
        "# Training dynamics",
        f"Of {where}; mean over seeds with {parts.INTERVALS}. Cosines are to the last recorded"
        ' weights, which they reach by definition; "settled" is the step from which on a cosine'
        f" stays at {result.settings['level']:g} or above.",
        _settled(result),
        parts.section("LoRA-SAM: terms of Eq. 5", _ratios(result)),
        parts.section("Primary and auxiliary", _overlaps(result)),
        parts.claims(judge(result)),
        parts.closing(result),
    )


def figure(result: Result, group: str, name: str) -> Summary:
    """A key figure of a group; an empty one where it has none."""
    return result.summary(group, name) or Summary(group, name)


def told(line: Summary, form: str = ".3g") -> str:
    """A mean with its interval."""
    return parts.mean(line, Metric("", form=form))


def _settled(result: Result) -> str:
    quantities = {"product": "B A", "factors": "A and B", "A": "A", "B": "B"}
    titles = [f"{title} settled" for title in quantities.values()]
    head, rows = ["run", "seeds", "adapter", *titles, "A at start"], []
    for group in result.groups:
        steps = result.settings["steps"][group]
        for who in ("primary", "auxiliary"):
            lines = [figure(result, group, f"settled {who}/{name}") for name in quantities]
            if result.summary(group, f"settled {who}/product"):
                start = told(figure(result, group, f"start {who}/A"), ".2f")
                first = [group, str(len(result.members(group))), who]
                rows.append([*first, *(f"{told(line)} of {steps}" for line in lines), start])
    return parts.table(head, rows)


def _ratios(result: Result) -> str:
    head = ["run", "ratio, lowest step", "median step", "highest step"]
    head += ["median single layer", f"layers above {NEGLIGIBLE:.0f}"]
    names = [*(f"{what} {RATIO}" for what in ("lowest", "median", "highest")), "layer_ratio"]
    rows = [
        [
            group,
            *(told(figure(result, group, name)) for name in names),
            told(figure(result, group, "layers_above"), ".0%"),
        ]
        for group in groups_with(result, FIRST_ORDER)
    ]
    return parts.table(head, rows) if rows else ""


def _overlaps(result: Result) -> str:
    head = ["run", "Col(B) overlap (random)", "Row(A) overlap (random)", "cosine of B A"]
    head += ["largest cosine to the primary's final", "ascent gain, mean over steps"]
    rows = []
    for group in groups_with(result, COSINE):
        shown = []
        for name in (COLUMNS, ROWS):
            chance = parts.number(figure(result, group, f"chance {name}").mean, Metric(""))
            shown.append(f"{told(figure(result, group, f'final {name}'))} ({chance})")
        names = (f"final {COSINE}", f"largest {CROSS}/product", f"mean {GAIN}")
        rows.append([group, *shown, *(told(figure(result, group, name)) for name in names)])
    return parts.table(head, rows) if rows else ""


def judge(result: Result) -> list[Claim]:
    """All claims that these groups can be held against."""
    judged: list[Claim] = []
    methods = {entry.group: entry.method for entry in result.subjects}
    for group in result.groups:
        if methods[group] == "lora-sam":
            judged += [_third_term(result, group), _rapid(result, group)]
        if result.summary(group, "settled auxiliary/product"):
            judged += [_slower(result, group), _last_fifth(result, group)]
            judged.append(_independent(result, group))
    return judged + _larger_rate(result)


def _third_term(result: Result, group: str) -> Claim:
    """Judged layer by layer, as the paper follows single layers."""
    lowest, middle, highest, single, share = (
        figure(result, group, name)
        for name in (
            *(f"{what} {RATIO}" for what in ("lowest", "median", "highest")),
            *("layer_ratio", "layers_above"),
        )
    )
    if middle.mean is None or share.mean is None:
        verdict, evidence = UNCLEAR, "no step has a ratio"
    else:
        verdict = AGREES if share.mean == 1 else DISAGREES if share.mean == 0 else IN_PART
        ends = (parts.number(line.mean, Metric("")) for line in (lowest, highest))
        evidence = (
            f"||B e_A + e_B A|| / ||e_B e_A|| is {told(single)} in the median over single layers"
            f" and steps, and {told(share, '.0%')} of the layers have a median above"
            f" {NEGLIGIBLE:g}; of all chosen layers as one it is {told(middle)} in the median,"
            f" from {' to '.join(ends)}"
        )
    claim = f"the third term of Eq. 5 is more than {NEGLIGIBLE:g} times smaller than the first two"
    return Claim(group, "Fig. 2b", claim, verdict, evidence)


def _rapid(result: Result, group: str) -> Claim:
    steps, level = result.settings["steps"][group], result.settings["level"]
    lines = {name: figure(result, group, f"settled primary/{name}") for name in "AB"}
    evidence = " and ".join(
        f"{name} stays above a cosine of {level:g} from step {told(line)} of {steps} on (it starts"
        f" at {told(figure(result, group, f'start primary/{name}'), '.2f')})"
        for name, line in lines.items()
    )
    verdict = both([below(line.interval, RAPID * steps) for line in lines.values()])
    claim = "A and B of LoRA-SAM converge rapidly (here: in the first half of the run)"
    return Claim(group, "Fig. 2c", claim, verdict, evidence)


def _slower(result: Result, group: str) -> Claim:
    steps, level = result.settings["steps"][group], result.settings["level"]
    evidence = []
    for name, words in (("product", "the weights B A"), ("factors", "A and B as one vector")):
        one, other = (
            told(figure(result, group, f"settled {who}/{name}")) for who in ("primary", "auxiliary")
        )
        lag = figure(result, group, f"lag {name}")
        evidence.append(
            f"by {words} the primary passes {level:g} at step {one}, the auxiliary at {other} of"
            f" {steps}, {_later(lag.mean, lag.interval)}"
        )
    claim = "the auxiliary converges substantially slower than the primary"
    verdict = above(figure(result, group, "lag product").interval, 0)
    return Claim(group, "Fig. A2", claim, verdict, "; ".join(evidence))


def _later(lag: float | None, ends: parts.Interval | None) -> str:
    if lag is None:
        return "which can't be compared"
    word = "later" if lag >= 0 else "earlier"
    return f"{abs(lag):.3g} steps {word} (difference {parts.interval(ends, Metric(''), '+')})"


def _last_fifth(result: Result, group: str) -> Claim:
    share = figure(result, group, "share product")
    evidence = f"it passes {result.settings['level']:g} after {told(share, '.0%')} of the steps"
    claim = "the auxiliary converges in the last fifth of the steps only"
    verdict = above(share.interval, LAST_FIFTH)
    return Claim(group, "Fig. A2", claim, verdict, evidence)


def _independent(result: Result, group: str) -> Claim:
    """By the weights and by the factors, which have no gauge in common."""
    product, factors = (
        figure(result, group, f"largest {CROSS}/{name}") for name in ("product", "factors")
    )
    evidence = (
        "|cosine| to the primary's final weights is at most"
        f" {told(product, '.2f')} over training by the weights B A"
    )
    verdicts = [below(product.interval, INDEPENDENT)]
    if factors.mean is not None:  # equal ranks
        evidence += f" and {told(factors, '.3f')} by A and B as one vector"
        verdicts.append(below(factors.interval, INDEPENDENT))
    verdict = IN_PART if {AGREES, DISAGREES} <= set(verdicts) else both(verdicts)
    claim = (
        "the auxiliary's course is independent of the primary (here: a cosine below"
        f" {INDEPENDENT:g})"
    )
    return Claim(group, "Fig. A2", claim, verdict, evidence)


def _larger_rate(result: Result) -> list[Claim]:
    """Neighbours in the auxiliary's rate among groups that differ in nothing else shown."""
    options: dict[str, dict[str, Any]] = result.settings["options"]
    groups = [group for group in result.groups if options[group].get(_OWN_RATE) is not None]
    groups.sort(key=lambda group: options[group][_OWN_RATE])
    pairs = [pair for pair in itertools.pairwise(groups) if _differ_in_rate(options, pair)]
    return [_slowed(result, slow, fast) for slow, fast in pairs]


def _differ_in_rate(options: dict[str, dict[str, Any]], groups: Sequence[str]) -> bool:
    rest = [{k: v for k, v in options[g].items() if k != _OWN_RATE} for g in groups]
    rates = [options[group][_OWN_RATE] for group in groups]
    return rest[0] == rest[1] and rates[0] != rates[1]


def _slowed(result: Result, slow: str, fast: str) -> Claim:
    name, level = "settled auxiliary/product", result.settings["level"]
    rates = [result.settings["options"][group][_OWN_RATE] for group in (slow, fast)]
    ends = [told(figure(result, group, name)) for group in (slow, fast)]
    rows = [row for group in (slow, fast) for row in result.select(name, group)]
    lines = [line for line in compare.summaries(rows, control=slow) if line.group == fast]
    lag = lines[0] if lines else Summary(fast, name)
    evidence = (
        f"the auxiliary passes {level:g} at step {ends[0]} with {rates[0]:g} and at"
        f" {ends[1]} with {rates[1]:g}, {_later(lag.difference, lag.difference_interval)}"
    )
    claim = "a larger learning rate of the auxiliary slows its convergence"
    verdict = above(lag.difference_interval, 0)
    return Claim(f"{slow} and {fast}", "Fig. A2", claim, verdict, evidence)
