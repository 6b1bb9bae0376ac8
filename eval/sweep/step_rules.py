"""Rules that choose a checkpoint, and how close they come to the checkpoint with the best samples.

A rule chooses one of a run's checkpoints. Its regret is the best checkpoint's score "truth" (the
similarity of samples to held-out pictures) minus the score of the chosen checkpoint. The captions
are split into parts of 8: a rule that samples uses one part, and all rules are measured on the
other captions. The best checkpoint on these captions is partly the best by chance, so even a
perfect rule has a regret a little above 0; this affects all rules equally.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ..results.table import Metric

# Number of captions that a rule may sample, the same as for `--choose_by samples`
CAPTIONS = 8
BY_LOSS, LAST, BY_CAPTIONS = "regret_loss", "regret_last", "regret_captions"


def _metric(rule: str) -> Metric:
    explanation = "ground truth of the best checkpoint minus the chosen one's, on other captions"
    return Metric(f"regret of {rule}", explanation, False, scale=100, form=".2f")


RULES = {
    BY_LOSS: _metric("the step with the lowest held-out loss"),
    LAST: _metric("the last step"),
    BY_CAPTIONS: _metric(f"the best step on {CAPTIONS} sampled captions"),
}
# Step of a checkpoint -> score "truth" of each caption; all steps have the same order of captions
Truths = Mapping[int, Sequence[float]]


def regrets(truths: Truths, losses: Mapping[int, float]) -> dict[str, float]:
    """Return the regret of each rule on one run.

    Captions beyond the last whole part are not used.

    Args:
        truths: scores of the sampled checkpoints.
        losses: held-out loss by step; if a checkpoint has none, the rule by loss is left out.

    Returns:
        Rule -> regret, the mean over parts; {} if there are fewer than two parts of captions.
    """
    steps = sorted(truths)
    parts = min(map(len, truths.values()), default=0) // CAPTIONS
    if parts < 2:
        return {}
    rule_regrets: dict[str, list[float]] = {}
    for part in range(parts):
        # A part has every `parts`-th caption; the rules are measured on the other captions.
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
        # Of equally good steps, the first one is chosen.
        choices = {LAST: steps[-1], BY_CAPTIONS: max(steps, key=sampled_truth.__getitem__)}
        if losses.keys() >= truths.keys():
            choices[BY_LOSS] = min(steps, key=losses.__getitem__)
        best = max(judged_truth.values())
        for rule, step in choices.items():
            rule_regrets.setdefault(rule, []).append(best - judged_truth[step])
    return {rule: statistics.fmean(values) for rule, values in rule_regrets.items()}
