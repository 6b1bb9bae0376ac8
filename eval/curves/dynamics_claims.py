"""What the paper says of the dynamics (Figs. 2 and A2), judged by recorded runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .bands import Estimate
from .claims import (
    AGREES,
    DISAGREES,
    IN_PART,
    UNCLEAR,
    Claim,
    above,
    below,
    both,
    interval_shown,
    shown,
)
from .courses import CROSS

if TYPE_CHECKING:
    from .dynamics_result import GroupDynamics

NEGLIGIBLE = 1e4
"""How many times smaller the third term of Eq. 5 is said to be."""
LAST_FIFTH = 0.8
RAPID = 0.5
INDEPENDENT = 0.1
_OWN_RATE = "auxiliary_learning_rate"


def judge(groups: Sequence[GroupDynamics], level: float) -> list[Claim]:
    """All claims that these groups can be held against."""
    found: list[Claim] = []
    for group in groups:
        if group.method == "lora-sam":
            found += [_third_term(group), _rapid(group, level)]
        if "auxiliary/product" in group.settles:
            found += [_slower(group, level), _last_fifth(group, level), _independent(group)]
    return found + _larger_rate(groups, level)


def _third_term(group: GroupDynamics) -> Claim:
    """Judged layer by layer, as the paper follows single layers."""
    lowest, median, highest, single, share = (
        group.statistics[name]
        for name in ("ratio_lowest", "ratio_median", "ratio_highest", "layer_ratio", "layers_above")
    )
    if median.mean is None or share.mean is None:
        verdict, said = UNCLEAR, "no step has a ratio"
    else:
        verdict = AGREES if share.mean == 1 else DISAGREES if share.mean == 0 else IN_PART
        said = (
            f"||B e_A + e_B A|| / ||e_B e_A|| is {shown(single)} in the median over single layers"
            f" and steps, and {shown(share, '.0%')} of the layers have a median above"
            f" {NEGLIGIBLE:g}; of all chosen layers as one it is {shown(median)} in the median,"
            f" from {_plain(lowest)} to {_plain(highest)}"
        )
    claim = f"the third term of Eq. 5 is more than {NEGLIGIBLE:g} times smaller than the first two"
    return Claim(group.label, "Fig. 2b", claim, verdict, said)


def _rapid(group: GroupDynamics, level: float) -> Claim:
    half = RAPID * group.steps
    own = {name: group.settles[f"primary/{name}"] for name in "AB"}
    said = " and ".join(
        f"{name} stays above a cosine of {level:g} from step {shown(e)} of {group.steps} on (it"
        f" starts at {shown(group.start[f'primary/{name}'], '.2f')})"
        for name, e in own.items()
    )
    verdict = both([below(e, half) for e in own.values()])
    claim = "A and B of LoRA-SAM converge rapidly (here: in the first half of the run)"
    return Claim(group.label, "Fig. 2c", claim, verdict, said)


def _slower(group: GroupDynamics, level: float) -> Claim:
    said = []
    for name, words in (("product", "the weights B A"), ("factors", "A and B as one vector")):
        one, other = (group.settles[f"{who}/{name}"] for who in ("primary", "auxiliary"))
        said.append(
            f"by {words} the primary passes {level:g} at step {shown(one)}, the auxiliary at"
            f" {shown(other)} of {group.steps}, {_later(other.minus(one))}"
        )
    verdict = above(_lag(group), 0)
    claim = "the auxiliary converges substantially slower than the primary"
    return Claim(group.label, "Fig. A2", claim, verdict, "; ".join(said))


def _lag(group: GroupDynamics) -> Estimate:
    return group.settles["auxiliary/product"].minus(group.settles["primary/product"])


def _later(lag: Estimate) -> str:
    if lag.mean is None:
        return "which can't be compared"
    word = "later" if lag.mean >= 0 else "earlier"
    return f"{abs(lag.mean):.3g} steps {word} (difference {interval_shown(lag.interval, '+.3g')})"


def _last_fifth(group: GroupDynamics, level: float) -> Claim:
    settled = group.settles["auxiliary/product"]
    share = Estimate.of({seed: value / group.steps for seed, value in settled.values.items()})
    said = f"it passes {level:g} after {shown(share, '.0%')} of the steps"
    claim = "the auxiliary converges in the last fifth of the steps only"
    return Claim(group.label, "Fig. A2", claim, above(share, LAST_FIFTH), said)


def _independent(group: GroupDynamics) -> Claim:
    """By the weights and by the factors, which have no gauge in common."""
    largest = {name: group.statistics[f"largest_{CROSS}/{name}"] for name in ("product", "factors")}
    said = (
        "|cosine| to the primary's final weights is at most"
        f" {shown(largest['product'], '.2f')} over training by the weights B A"
    )
    verdicts = [below(largest["product"], INDEPENDENT)]
    if largest["factors"].mean is not None:  # equal ranks
        said += f" and {shown(largest['factors'], '.3f')} by A and B as one vector"
        verdicts.append(below(largest["factors"], INDEPENDENT))
    verdict = IN_PART if {AGREES, DISAGREES} <= set(verdicts) else both(verdicts)
    claim = (
        "the auxiliary's course is independent of the primary (here: a cosine below"
        f" {INDEPENDENT:g})"
    )
    return Claim(group.label, "Fig. A2", claim, verdict, said)


def _larger_rate(groups: Sequence[GroupDynamics], level: float) -> list[Claim]:
    """Neighbours in the auxiliary's rate among groups that differ in nothing else shown."""
    own = [group for group in groups if group.options.get(_OWN_RATE) is not None]
    own.sort(key=lambda group: group.options[_OWN_RATE])
    found = []
    for slow, fast in itertools.pairwise(own):
        rest = [{k: v for k, v in g.options.items() if k != _OWN_RATE} for g in (slow, fast)]
        rates = [g.options[_OWN_RATE] for g in (slow, fast)]
        if rest[0] != rest[1] or rates[0] == rates[1]:
            continue
        ends = [g.settles["auxiliary/product"] for g in (slow, fast)]
        lag = ends[1].minus(ends[0])
        said = (
            f"the auxiliary passes {level:g} at step {shown(ends[0])} with {rates[0]:g} and at"
            f" {shown(ends[1])} with {rates[1]:g}, {_later(lag)}"
        )
        claim = "a larger learning rate of the auxiliary slows its convergence"
        label = f"{slow.label} and {fast.label}"
        found.append(Claim(label, "Fig. A2", claim, above(lag, 0), said))
    return found


def _plain(estimate: Estimate) -> str:
    return "n/a" if estimate.mean is None else f"{estimate.mean:.3g}"
