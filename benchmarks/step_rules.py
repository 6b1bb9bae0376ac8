"""Which rule finds the step with the best samples? What `pictures.py` says of it.

A rule names one of a run's checkpoints. Its regret is the ground truth that the best checkpoint has
more than that one. Captions are split into parts of 8: a rule that samples sees one part, and all
rules are measured on the other captions. The best checkpoint is best on these by chance too, so
the regret of a perfect rule is a little above 0, for each rule alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from eval.table import Metric

CAPTIONS = 8
"""Captions that a rule may sample, as many as `--choose_by samples` takes."""
BY_LOSS, LAST, BY_CAPTIONS = "regret_loss", "regret_last", "regret_captions"


def _metric(rule: str) -> Metric:
    explanation = "ground truth that the best checkpoint has more, over captions not sampled for it"
    return Metric(f"regret of {rule}", explanation, False, scale=100, form=".2f")


RULES = {
    BY_LOSS: _metric("the step of the lowest held-out loss"),
    LAST: _metric("the last step"),
    BY_CAPTIONS: _metric(f"the best step by {CAPTIONS} sampled captions"),
}
Truths = Mapping[int, Sequence[float]]
"""Checkpoint's step -> ground truth of each caption, in one order of captions."""


def regrets(truths: Truths, losses: Mapping[int, float]) -> dict[str, float]:
    """The regret of each rule on one run; {} where there are no two parts of captions.

    Args:
        truths: of the sampled checkpoints.
        losses: held-out loss of checkpoints; a rule without one at each of them is left out.
    """
    steps = sorted(truths)
    captions = len(truths[steps[0]])
    parts = captions // CAPTIONS
    if parts < 2:
        return {}
    rule_regrets: dict[str, list[float]] = {}
    for part in range(parts):
        seen = range(part, captions, parts)
        unseen = [caption for caption in range(captions) if caption % parts != part]
        truth_of_step = {step: _mean(truths[step], unseen) for step in steps}
        best = max(truth_of_step.values())
        chosen = {
            LAST: steps[-1],
            BY_CAPTIONS: max(steps, key=lambda step: _mean(truths[step], seen)),
        }
        if losses.keys() >= truths.keys():
            chosen[BY_LOSS] = min(steps, key=lambda step: losses[step])
        for rule, step in chosen.items():
            rule_regrets.setdefault(rule, []).append(best - truth_of_step[step])
    return {rule: statistics.fmean(values) for rule, values in rule_regrets.items()}


def _mean(values: Sequence[float], places: Sequence[int]) -> float:
    return statistics.fmean(values[place] for place in places)
