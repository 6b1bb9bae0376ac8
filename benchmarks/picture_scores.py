"""Scores of `pictures.py` beside those of eval.clip_scores, and how all of them are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from picture_presets import CONTROL, Guidance, Preset
from PIL.Image import Image

from bilora_diffusion.mini.colors import SQUARE
from eval import plot, report
from eval.clip_scores.measure import truth_pictures
from eval.clip_scores.names import METRICS as CLIP_METRICS
from eval.clip_scores.prompts import read
from eval.plot import Curve, Panel
from eval.sweep.reporting import HELDOUT
from eval.table import Metric, Result

FRONTS = "fronts.png"
CURVES = "curves.png"
SAMPLED = ("truth", "i2t", "t2t", "nearest", "dino_truth", "dino_nearest")
SAMPLED_METRICS = {name: CLIP_METRICS[name] for name in SAMPLED}
METRICS = {
    **SAMPLED_METRICS,
    "colors": Metric(
        "colour difference, %",
        f"of mean colours over {SQUARE} x {SQUARE} pixels, to the held-out picture",
        scale=100,
        form=".2f",
    ),
    HELDOUT: Metric("held-out loss", "x 1000", scale=1000, form=".2f"),
}


def preset_truths(preset: Preset, result: Result) -> dict[str, Image]:
    """The held-out picture of each prompt of a scored result that has one."""
    scored = {prompt["text"] for prompt in result.settings["prompts"]}
    prompts = [prompt for prompt in read(preset.prompts) if prompt.text in scored]
    return truth_pictures(prompts, result.settings["sampling"]["base_model"])


def curve_panels(result: Result, guidances: Sequence[Guidance]) -> list[list[Panel]]:
    """Metrics over training: a row for each metric, a column for each kind of guidance."""
    rows = []
    for metric in ("truth", "i2t", "nearest"):
        panels = []
        for guidance in guidances:
            curves = [Curve(group, metric, guidance.label, label=group) for group in result.groups]
            title = f"{METRICS[metric].title}, {guidance.label}"
            if result.select(metric, item=guidance.label):
                panels.append(Panel(title, "cosine", curves))
        if panels:
            rows.append(panels)
    return rows


def step_sections(result: Result) -> list[str]:
    """A section for each metric and kind of guidance, with its table over checkpoints."""
    sections = []
    for metric in METRICS:
        items = list(dict.fromkeys(row.item for row in result.select(metric)))
        for item in items:
            title = METRICS[metric].title + (f", {item}" if item else "")
            sections.append(report.section(title, step_table(result, metric, item)))
    return sections


def step_table(result: Result, metric: str, item: str) -> str:
    """A row for each variant, a column for each checkpoint: its mean, and how it differs from the
    control's.
    """
    steps = sorted({row.step or 0 for row in result.select(metric, item=item)})
    rows = []
    for group in result.groups:
        cells = [group]
        for step in steps:
            line = result.summary(group, metric, item, step)
            cell = report.mean(line, METRICS[metric], intervals=False)
            if group != result.control:
                cell += f" ({report.difference(line, METRICS[metric])})"
            cells.append(cell)
        rows.append(cells)
    return report.table(["variant", *(f"step {step}" for step in steps)], rows)


def draw_fronts(result: Result, guidances: Sequence[Guidance], folder: Path) -> list[str]:
    """Likeness to what was to be learned over agreement with the prompt, a line for each variant
    through its checkpoints; one pair of axes for each kind of guidance.

    Likeness is that to the held-out pictures; without them, to the nearest training picture.
    """
    likeness = "truth" if result.select("truth") else "nearest"
    styles = plot.group_styles(result.groups, CONTROL)
    with plot.canvas(folder / FRONTS, 1, len(guidances)) as (_, axes):
        for axis, guidance in zip(axes.flat, guidances, strict=True):
            for group in result.groups:
                horizontal = result.curve(group, "i2t", guidance.label)
                vertical = result.curve(group, likeness, guidance.label)
                for metric_line in (horizontal, vertical):
                    if any(point.mean is None for point in metric_line):
                        return []
                x = [100 * (point.mean or 0.0) for point in horizontal]
                y = [100 * (point.mean or 0.0) for point in vertical]
                x_error = [100 * (point.error or 0.0) for point in horizontal]
                y_error = [100 * (point.error or 0.0) for point in vertical]
                color = styles[group]["color"]
                axis.errorbar(
                    x,
                    y,
                    y_error,
                    x_error,
                    label=group,
                    color=color,
                    marker=".",
                    lw=1,
                    elinewidth=0.6,
                )
                for point, place in zip(vertical, zip(x, y, strict=True), strict=True):
                    if group == result.control:
                        axis.annotate(f"{point.step}", place, fontsize=6, color="gray")
            plot.finish(axis, guidance.label, METRICS[likeness].title, xlabel="CLIP I2T")
    return [FRONTS]
