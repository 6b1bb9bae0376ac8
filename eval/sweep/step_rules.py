"""Rules that choose a checkpoint, and how far they miss the one with the best samples.

A rule names one of a run's checkpoints. Its regret is the ground truth of the best checkpoint minus
that of the named one. Captions are split into parts of 8: a rule that samples uses one part, and
all rules are measured on the other captions. The best checkpoint is best on these partly by chance,
so the regret of a perfect rule is a little above 0, equally for each rule.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ..results.table import Metric

# Captions that a rule may sample, as many as `--choose_by samples` takes
CAPTIONS = 8
BY_LOSS, LAST, BY_CAPTIONS = "regret_loss", "regret_last", "regret_captions"


def _metric(rule: str) -> Metric:
    explanation = "ground truth that the best checkpoint has more, over captions not sampled for it"
    return Metric(f"regret of {rule}", explanation, False, scale=100, form=".2f")


RULES = {
    BY_LOSS: _metric("the step of the lowest held-out loss"),
    LAST: _metric("the last step"),
    BY_CAPTIONS: _metric(f"the best step by {CAPTIONS} sampled captions"),
}
# Step of a checkpoint -> ground truth of each caption, in one order of captions
Truths = Mapping[int, Sequence[float]]


def regrets(truths: Truths, losses: Mapping[int, float]) -> dict[str, float]:
    """The regret of each rule on one run; {} without two parts of captions with a ground truth.

    Captions beyond the last whole part are left out.

    Args:
        truths: of the sampled checkpoints.
        losses: held-out loss by step. Without one at each checkpoint the rule by loss is left out.
    """
    steps = sorted(truths)
    parts = min(map(len, truths.values()), default=0) // CAPTIONS
    if parts < 2:
        return {}
    rule_regrets: dict[str, list[float]] = {}
    for part in range(parts):
        # A part has every parts-th caption; the other captions judge.
        sampled_truth, judged_truth = {}, {}
        for step in steps:
            sampled, judged = [], []
            for caption, truth in enumerate(truths[step][: parts * CAPTIONS]):
                if caption % parts == part:
                    sampled.append(truth)
                else:
                    judged.append(truth)
            sampled_truth[step] = statistics.fmean(sampled)
            judged_truth[step] = statistics.fmean(judged)
        # Of equally good steps the first
        choices = {LAST: steps[-1], BY_CAPTIONS: max(steps, key=sampled_truth.__getitem__)}
        if losses.keys() >= truths.keys():
            choices[BY_LOSS] = min(steps, key=losses.__getitem__)
        best = max(judged_truth.values())
        for rule, step in choices.items():
            rule_regrets.setdefault(rule, []).append(best - judged_truth[step])
    return {rule: statistics.fmean(values) for rule, values in rule_regrets.items()}
