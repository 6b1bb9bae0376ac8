"""Tables of docs/results.md about guidance: the guided target, and the unconditional prediction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from eval.results import report
from eval.results.table import Result

from .evidence import Check, figure
from .tables import (
    BASE_GUIDANCE,
    CONTROL,
    COSINE,
    GUIDANCE,
    ONE_SEED_SETS,
    SETS,
    STEPS,
    cell,
    difference,
    mean,
    read,
    seeds,
    step_heads,
)

# Variant that holds the unconditional prediction -> its column head
HOLD_VARIANTS = {
    "LoRA, held weakly": "weight 1, every 16th step",
    "LoRA, held": "weight 4, every 16th",
    "LoRA, held strongly": "weight 16, every 16th",
    "LoRA, held often": "weight 1, every 4th",
}
# Image sets whose results are in results/guided_target_SET
GUIDED_SETS = {**SETS, "pastel": ONE_SEED_SETS["pastel"]}
GUIDED = "LoRA, guided target 1.5"
SCALES = (1, 2, 4)
# Image sets whose results are in results/guidance_strength_SET
STRENGTH_SETS = {**SETS, **ONE_SEED_SETS}
# Step -> suffix of the result folder that has it
STRENGTH_STEPS = {100: "", 300: "", 1000: "_1000"}
# Scale -> strength of the adapter in the unconditional prediction -> item of the result
STRENGTHS = {
    4: {
        "1": GUIDANCE,
        "0.75": "guidance 4 from strength 0.75",
        "0.5": "guidance 4 from strength 0.5",
        "0.25": "guidance 4 from strength 0.25",
        "0": "base's guidance 4",
    },
    2: {"1": "guidance 2", "0.5": "guidance 2 from strength 0.5", "0": BASE_GUIDANCE},
}


def guided_target() -> Iterable[str]:
    """Generate the table of LoRA's scores and the guided target's differences by step and scale."""
    rows = []
    for name, title in GUIDED_SETS.items():
        result = read(f"guided_target_{name}")
        for step in (100, 200, 300):
            cells = []
            for group in (CONTROL, GUIDED):
                for scale in SCALES:
                    line = result.summary(group, "truth", f"guidance {scale}", step)
                    cells.append(cell(result, line, COSINE))
            first_cell = f"{title}, {seeds(result)}" if step == 100 else ""
            rows.append((first_cell, f"{step}", *cells))
    heads = [f"LoRA at {scale}" for scale in SCALES]
    heads += [f"guided target at {scale}" for scale in SCALES]
    yield report.table(("data, seeds", "step", *heads), rows)


def guided_target_without_guidance() -> Iterable[str]:
    """Generate the table that compares a guided target at scale 1 with LoRA at its best scale.

    It has the score, the agreement with the prompt and the likeness to the nearest training image.
    """
    rows = []
    for name, title in GUIDED_SETS.items():
        result = read(f"guided_target_{name}")
        for step in (100, 300):
            scale = best_scale(result, step)
            cells = [f"{title}, {seeds(result)}" if step == 100 else "", f"{step}", f"{scale}"]
            for metric in ("truth", "i2t", "nearest"):
                control = result.summary(CONTROL, metric, f"guidance {scale}", step)
                cells.append(mean(control, COSINE))
                check = Check(
                    "",
                    f"results/guided_target_{name}",
                    GUIDED,
                    metric,
                    "guidance 1",
                    control=CONTROL,
                    control_item=f"guidance {scale}",
                    step=step,
                )
                cells.append(difference(check, COSINE))
            rows.append(tuple(cells))
    heads = ["data, seeds", "step", "LoRA's best scale"]
    for title in ("score", "image to text", "nearest training image"):
        heads += [f"{title}, LoRA", "guided target at 1"]
    yield report.table(heads, rows)


def best_scale(result: Result, step: int) -> int:
    """Return the scale of guidance at which LoRA's samples are closest to the held-out images."""

    def score(scale: int) -> float:
        line = result.summary(CONTROL, "truth", f"guidance {scale}", step)
        return (line.mean if line else None) or 0.0

    return max(SCALES, key=score)


def guidance() -> Iterable[str]:
    """Generate the table of LoRA's score with ordinary guidance and with the base model's."""
    rows = []
    for name, title in SETS.items():
        cells = []
        for step in STEPS:
            scores = []
            for item in (GUIDANCE, BASE_GUIDANCE):
                line = read(f"pictures_{name}").summary(CONTROL, "truth", item, step)
                scores.append(mean(line, COSINE))
            cells.append(" to ".join(scores))
        rows.append((title, *cells))
    yield report.table(("data", *step_heads(STEPS)), rows)


def hold_weights() -> Iterable[str]:
    """Generate the table of scores with a held unconditional prediction, at step 300."""
    rows = []
    for name, title in SETS.items():
        result = read(f"pictures_{name}_hold_weights")
        cells = []
        for group in (CONTROL, *HOLD_VARIANTS):
            cells.append(cell(result, result.summary(group, "truth", GUIDANCE, 300), COSINE))
        rows.append((title, *cells))
    yield report.table(("data", CONTROL, *HOLD_VARIANTS.values()), rows)


def strengths() -> Iterable[str]:
    """Generate one table per scale: LoRA's score by strength in the unconditional prediction."""
    for scale, items in STRENGTHS.items():
        yield strength_table(scale, items)


def strength_table(scale: int, items: Mapping[str, str]) -> str:
    """Return the table of one scale; its last row has the lowest difference of each strength.

    Args:
        scale: Scale of guidance.
        items: Item of the result by strength. Differences are from the first item.
    """
    first, *other_strengths = items
    rows = []
    lowest = dict.fromkeys(other_strengths, float("inf"))
    for name, title in STRENGTH_SETS.items():
        for step, ending in STRENGTH_STEPS.items():
            folder = f"guidance_strength_{name}{ending}"
            result = read(folder)
            line = result.summary(CONTROL, "truth", items[first], step)
            cells = [f"{title}, {seeds(result)}" if step == 100 else "", f"{step}"]
            cells.append(mean(line, COSINE))
            for strength in other_strengths:
                check = Check(
                    "",
                    f"results/{folder}",
                    CONTROL,
                    "truth",
                    items[strength],
                    minus_item=items[first],
                    step=step,
                )
                lowest[strength] = min(lowest[strength], figure(check).mean)
                cells.append(difference(check, COSINE))
            rows.append(tuple(cells))
    worst = [report.number(value, COSINE, "+") for value in lowest.values()]
    rows.append(("the lowest", "", "", *worst))
    heads = [
        f"scale {scale}, strength {first}",
        *[f"strength {strength}" for strength in other_strengths],
    ]
    return report.table(("data, seeds", "step", *heads), rows)
