"""Tables of sampled images and of the lowest held-out loss in README.md and docs/results.md.

All figures are computed from ``results/``; none is written by hand.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence

from bilora_diffusion.core.figures import Interval, mean_interval
from bilora_diffusion.core.values import HELDOUT_LOSS
from eval import compare, report, table
from eval.sweep import step_rules
from eval.table import Metric, Result, Summary

from .evidence import ROOT, Check, Figure, figure

CONTROL = "LoRA"
GUIDANCE, BASE_GUIDANCE = "guidance 4", "base's guidance 2"
STEPS = (100, 300, 1000)
# Metrics of the tables: cosines x 100 and losses x 1000
COSINE = Metric("cosine", scale=100, form=".1f")
LOSS = Metric("loss", scale=1000, form=".1f")
# Set of images -> its name in the tables; the results lie in results/pictures_SET
SETS = {
    "icons": "23 icons",
    "animals": "12 animals",
    "duotone": "icons in two colors",
    "gray": "gray icons",
}
ONE_SEED_SETS = {"pastel": "icons in pastel", "flow": "23 icons, mini-flow"}
VARIANTS = {
    CONTROL: CONTROL,
    "Bi-LoRA": "Bi-LoRA, `rho` 0.05",
    "Bi-LoRA, rho auto": "`--rho auto`",
    "Bi-LoRA, per sample": "per-sample, `--rho auto`",
}
RIVAL_VARIANTS = {
    CONTROL: CONTROL,
    "LoRA-SAM": "LoRA-SAM, two passes",
    "LoRA, EMA": "LoRA, `--use_ema`",
}
# How strongly and how often the unconditional prediction is held
HOLD_VARIANTS = {
    "LoRA, held weakly": "weight 1, every 16th step",
    "LoRA, held": "weight 4, every 16th",
    "LoRA, held strongly": "weight 16, every 16th",
    "LoRA, held often": "weight 1, every 4th",
}
SUBJECT_VARIANTS = {
    CONTROL: CONTROL,
    "Bi-LoRA, per sample": "per-sample, `--rho auto`",
    "per sample, a quarter of the rise": "`--loss_rise 0.1`, a quarter of the default",
    "per sample, at low noise": "at low noise only, `--auxiliary_snr_gamma 50`",
    "per sample, doubled rate": "learning rate doubled",
    "LoRA, doubled rate": "LoRA, learning rate doubled",
}
# Group of results/fit_by_samples -> value of `--choose_by`, and the choice of its search
JUDGES = {
    "Bi-LoRA (fit-samples)": (
        "`samples`",
        "Bi-LoRA, `rho` 0.05, learning rate 2e-3, rank 8, 60 steps",
    ),
    "Bi-LoRA (fit-loss)": (
        "`loss`",
        "per-sample auxiliaries, `--rho auto`, learning rate 1e-3, rank 16, 150 steps",
    ),
}
BEST = f"best {HELDOUT_LOSS}"
ONE_AUXILIARY, PER_SAMPLE = "one, rho auto", "one for each sample, rho auto"


def lowest_loss(name: str, group: str, control: str = CONTROL, note: str = "") -> Check:
    """A group's lowest held-out loss minus its control's; the note stands behind the figure."""
    return Check(note, f"results/{name}", group, BEST, control=control)


# Rows of the README's table of losses: what was trained on, then the figure of each variant; None
# where nothing was measured.
LOSS_ROWS: dict[str, Sequence[Check | None]] = {
    "23 icons": (
        lowest_loss("lora_bilora", "method=bilora", "method=lora"),
        lowest_loss("auxiliaries_icons", ONE_AUXILIARY),
        lowest_loss("auxiliaries_icons", PER_SAMPLE),
    ),
    "12 animals": (
        None,
        lowest_loss("auxiliaries_animals", ONE_AUXILIARY),
        lowest_loss("auxiliaries_animals", PER_SAMPLE),
    ),
    "mini-flow (a small SD3)": (
        lowest_loss("mini_flow", "Bi-LoRA"),
        lowest_loss(
            "auxiliaries_flow", "one, rho auto, rise 0.05", note=" with `--loss_rise 0.05`"
        ),
        lowest_loss("auxiliaries_flow", PER_SAMPLE),
    ),
    "128 reviews (text)": (
        lowest_loss("radius_reviews", "rho 0.1", note=", `rho` 0.1"),
        lowest_loss("radius_reviews", "auto, rise 0.2"),
        lowest_loss("auxiliaries_reviews", PER_SAMPLE),
    ),
}


@functools.cache
def read(name: str) -> Result:
    """The result ``pictures_NAME``."""
    return table.read(ROOT / "results" / f"pictures_{name}")


def cell(result: Result, line: Summary | None, metric: Metric, intervals: bool = True) -> str:
    """The mean of the control, or another group's difference to it with its interval."""
    if line is None:
        return report.NOT_AVAILABLE
    if line.group == result.control:
        return report.number(line.mean, metric)
    text = report.number(line.difference, metric, "+")
    if intervals and line.difference_interval is not None:
        text += f" {report.interval(line.difference_interval, metric, '+')}"
    return without_signs_of_zeros(text)


def without_signs_of_zeros(text: str) -> str:
    """The text without the sign of each number that is rounded to zero."""
    return re.sub(r"[+-](0\.0+)\b", r"\1", text)


def seeds(result: Result) -> int:
    """Number of training seeds."""
    return len(result.members(CONTROL))


def samples() -> Iterable[str]:
    """The main table: each set and variant at three steps."""
    yield _scores_over_steps(SETS, VARIANTS, STEPS)


def one_seed() -> Iterable[str]:
    """The same with one training seed, on another set and with another model."""
    yield _scores_over_steps(ONE_SEED_SETS, VARIANTS, STEPS)


def rivals() -> Iterable[str]:
    """Scores of LoRA-SAM, and of LoRA with averaged weights."""
    sets = {"animals_rivals": SETS["animals"], "duotone_rivals": SETS["duotone"]}
    yield _scores_over_steps(sets, RIVAL_VARIANTS, (100, 300, 500, 1000))


def long() -> Iterable[str]:
    """Scores of one set over four times as many steps."""
    sets = {"duotone_long": SETS["duotone"]}
    yield _scores_over_steps(sets, VARIANTS, (500, 1000, 2000, 3000, 4000))


def _scores_over_steps(
    sets: Mapping[str, str], variants: Mapping[str, str], steps: Sequence[int]
) -> str:
    """Scores of the control at some steps, and differences to it of the other variants.

    Args:
        sets: name of a result -> its name in the table.
        variants: group -> its name in the table. Groups that a result lacks have no row.
    """
    rows = []
    for name, title in sets.items():
        result = read(name)
        for group, variant in variants.items():
            if not result.members(group):
                continue
            first_cell = f"{title}, {seeds(result)}" if group == CONTROL else ""
            cells = []
            for step in steps:
                line = result.summary(group, "truth", GUIDANCE, step)
                # Two seeds have no interval that deserves the name.
                cells.append(cell(result, line, COSINE, intervals=seeds(result) > 2))
            rows.append((first_cell, variant, *cells))
    return report.table(("data, seeds", "run", *_step_heads(steps)), rows)


def scales() -> Iterable[str]:
    """Scores at step 300 by kind and scale of guidance."""
    rows = []
    for name in ("duotone", "animals"):
        result = read(f"{name}_guidance")
        for group in (CONTROL, "Bi-LoRA, per sample"):
            for kind, label in {"guidance": "ordinary", "base's guidance": "from base"}.items():
                lines = [result.summary(group, "truth", f"{kind} {n}", 300) for n in (2, 3, 4)]
                cells = [cell(result, line, COSINE, intervals=False) for line in lines]
                rows.append((SETS[name], VARIANTS[group], label, *cells))
    yield report.table(("data", "run", "guidance", "scale 2", "scale 3", "scale 4"), rows)


def guidance() -> Iterable[str]:
    """LoRA's score with ordinary guidance, and with guidance from the base model."""
    rows = []
    for name, title in SETS.items():
        cells = []
        for step in STEPS:
            scores = []
            for item in (GUIDANCE, BASE_GUIDANCE):
                line = read(name).summary(CONTROL, "truth", item, step)
                scores.append(report.number(line.mean if line else None, COSINE))
            cells.append(" to ".join(scores))
        rows.append((title, *cells))
    yield report.table(("data", *_step_heads(STEPS)), rows)


def subjects() -> Iterable[str]:
    """Forms of per-sample auxiliaries on the animals."""
    result = read("animals_subjects")
    rows = []
    for group, variant in SUBJECT_VARIANTS.items():
        lines = [
            (result.summary(group, "truth", GUIDANCE, 150), COSINE),
            (result.summary(group, "truth", GUIDANCE, 300), COSINE),
            (result.summary(group, "i2t", GUIDANCE, 150), COSINE),
            (result.summary(group, HELDOUT_LOSS, step=300), LOSS),
        ]
        rows.append((variant, *[cell(result, line, metric) for line, metric in lines]))
    heads = ("score, step 150", "score, step 300", "image to text, step 150")
    yield report.table(("run", *heads, "held-out loss, step 300"), rows)


def hold_weights() -> Iterable[str]:
    """What holding the unconditional prediction changes at step 300, by weight and period."""
    rows = []
    for name, title in SETS.items():
        result = read(f"{name}_hold_weights")
        cells = []
        for group in (CONTROL, *HOLD_VARIANTS):
            cells.append(cell(result, result.summary(group, "truth", GUIDANCE, 300), COSINE))
        rows.append((title, *cells))
    yield report.table(("data", CONTROL, *HOLD_VARIANTS.values()), rows)


def hold_unconditional() -> Iterable[str]:
    """What holding the unconditional prediction changes over 1,000 steps."""
    steps = (100, 300, 500, 1000)
    rows = []
    for name, title in SETS.items():
        result = read(f"held_{name}")
        lines = [result.summary("LoRA, held", "truth", GUIDANCE, step) for step in steps]
        rows.append((title, *[cell(result, line, COSINE, intervals=False) for line in lines]))
    yield report.table(("data", *_step_heads(steps)), rows)


def rules() -> Iterable[str]:
    """Regrets of the rules that choose a step."""
    titles = {
        step_rules.BY_LOSS: "lowest held-out loss",
        step_rules.LAST: "last step",
        step_rules.BY_CAPTIONS: f"best step by {step_rules.CAPTIONS} sampled captions",
    }
    sets = {**SETS, **ONE_SEED_SETS}
    rows = []
    for rule, title in titles.items():
        cells = []
        for name in sets:
            regret, bounds = mean_regret(read(name), rule)
            text = report.number(regret, COSINE)
            if bounds is not None:
                text += f" {report.interval(bounds, COSINE)}"
            cells.append(without_signs_of_zeros(text))
        rows.append((title, *cells))
    yield report.table(("rule", *sets.values()), rows)


def mean_regret(result: Result, rule: str) -> tuple[float | None, Interval | None]:
    """Mean regret over variants, guidances and seeds, with its interval over seeds."""
    regrets_by_seed: dict[int | None, list[float]] = {}
    for row in result.select(rule):
        if row.value is not None:
            regrets_by_seed.setdefault(row.seed, []).append(row.value)
    if not regrets_by_seed:
        return None, None
    seed_means = [compare.mean(regrets) for regrets in regrets_by_seed.values()]
    return compare.mean(seed_means), mean_interval(seed_means)


def judges() -> Iterable[str]:
    """Scores of what a search chooses by samples, and by the held-out loss."""
    result = table.read(ROOT / "results" / "fit_by_samples")
    rows = []
    for group, (judge, choice) in JUDGES.items():
        score, image_to_text = result.summary(group, "truth"), result.summary(group, "i2t")
        assert score is not None
        assert image_to_text is not None
        bounds = report.interval(score.interval, COSINE)
        score_cell = f"{report.number(score.mean, COSINE)} {bounds}"
        rows.append((judge, choice, score_cell, report.number(image_to_text.mean, COSINE)))
    yield report.table(("`--choose_by`", "choice", "score", "image to text"), rows)


def readme() -> Iterable[str]:
    """The README's table: samples at step 300, and the lowest held-out loss in percent."""
    rows = []
    for name, title in SETS.items():
        result = read(name)
        lines = [result.summary(group, "truth", GUIDANCE, 300) for group in VARIANTS]
        cells = [cell(result, line, COSINE, intervals=False) for line in lines]
        rows.append((f"samples, {title}, {seeds(result)} seeds", *cells))
    for title, checks in LOSS_ROWS.items():
        cells = []
        for check in checks:
            cells.append("" if check is None else _percent(figure(check)) + check.title)
        rows.append((f"loss, {title}", "", *cells))
    heads = ("data", CONTROL, "the paper's setting", "`--rho auto`")
    yield report.table((*heads, "`--rho auto --auxiliaries sample`"), rows)


def _percent(difference: Figure) -> str:
    """How much a group is below or above its control, in percent of that."""
    if difference.low < 0 < difference.high:
        return "undecided"
    share = 100 * difference.mean / difference.size
    if abs(share) < 0.05:
        return "the same"
    direction = "lower" if share < 0 else "higher"
    return f"{abs(share):.1f} % {direction}"


def _step_heads(steps: Iterable[int]) -> list[str]:
    return [f"step {step:,}" for step in steps]
