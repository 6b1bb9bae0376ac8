"""Report of a sweep on the scores of its samples: metrics, tables over checkpoints, and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilora_diffusion.core.files import counted
from bilora_diffusion.core.values import HELDOUT_LOSS
from bilora_diffusion.mini.colors import SQUARE

from ..clip_scores.reporting import METRICS as CLIP_METRICS
from ..results import plot, report
from ..results.plot import Curve, Panel
from ..results.table import Metric, Result, Summary
from . import step_rules
from .experiment import condition_label, read_guidances

FRONTS = "fronts.png"
CURVES = "curves.png"
COLORS = "colors"
# Metrics of samples in the order of the report: first the main one, then those that explain it
SAMPLED = ("truth", "i2t", "t2t", "nearest", "dino_truth", "dino_nearest", "drift")
SAMPLED_METRICS = {name: CLIP_METRICS[name] for name in SAMPLED}
# Metric -> its change from the first condition to another one, such as rounded weights
CHANGES = {"truth": "change_truth", "i2t": "change_i2t"}


def _change(metric: str) -> Metric:
    title = CLIP_METRICS[metric].title
    explanation = f"{title} minus its value in the first condition"
    return Metric(f"change of {title}", explanation, True, scale=100, form=".2f")


METRICS = {
    **SAMPLED_METRICS,
    COLORS: Metric(
        "color difference, %",
        f"from the held-out picture, by mean colors of squares of {SQUARE} x {SQUARE} pixels",
        scale=100,
        form=".2f",
    ),
    **{change: _change(metric) for metric, change in CHANGES.items()},
    **step_rules.RULES,
}
# Metrics that are drawn as curves over steps
CURVE_METRICS = ("truth", "i2t", "nearest")


def introduction(result: Result) -> str:
    """Return the sentences above the tables."""
    settings = result.settings
    scores = settings["scores"]
    num_images = scores["num_prompts"] * len(scores["seeds"])
    return (
        f"{settings['experiment']}: {counted(len(settings['seeds']), 'training seed')};"
        f" {counted(num_images, 'image')} of each checkpoint for each kind of guidance, with the"
        f" prompts {scores['prompts']}."
        f" A cell is the mean over seeds, with the difference from {result.control} in brackets,"
        f" paired by seed, with {report.INTERVALS}.{_conditions_sentence(result)}"
    )


def _conditions_sentence(result: Result) -> str:
    """Return a sentence that lists the named conditions with their options; "" without any."""
    conditions = result.settings["scores"].get("conditions")
    if not conditions:
        return ""
    descriptions = []
    for name, options in conditions.items():
        values = ", ".join(f"{option} {value}" for option, value in options.items())
        descriptions.append(f"{name} ({values})" if values else name)
    return f" Every checkpoint is sampled in each condition: {'; '.join(descriptions)}."


def sections(result: Result) -> list[str]:
    """Return the sections of the report: rules that choose a step, then tables of the metrics.

    There is a table of variants and checkpoints for each metric and kind of guidance. With named
    conditions, the metrics of samples have tables of variants and conditions instead.
    """
    parts = [rule_section(result)]
    table_names = [*SAMPLED_METRICS, COLORS, HELDOUT_LOSS]
    if result.settings["scores"].get("conditions"):
        parts += condition_sections(result)
        table_names = [HELDOUT_LOSS]
    for name in table_names:
        metric = result.metric(name)
        for item in dict.fromkeys(row.item for row in result.select(name)):
            title = f"{metric.title}, {item}" if item else metric.title
            parts.append(report.section(title, step_table(result, name, item)))
    return parts


def condition_sections(result: Result) -> list[str]:
    """Return a table over the named conditions for each metric, kind of guidance and checkpoint."""
    scores = result.settings["scores"]
    parts = []
    for name in (*CHANGES.values(), *SAMPLED_METRICS, COLORS):
        for guidance in read_guidances(scores["guidances"]):
            labels = [condition_label(guidance, condition) for condition in scores["conditions"]]
            for step in scores["steps"]:
                columns = {}
                for condition, label in zip(scores["conditions"], labels, strict=True):
                    if result.select(name, item=label):
                        columns[condition] = (label, step)
                if columns:
                    title = f"{result.metric(name).title}, {guidance.label}, step {step}"
                    parts.append(report.section(title, variant_table(result, name, columns)))
    return parts


def rule_section(result: Result) -> str:
    """Return a table of the regret of each rule that chooses a step, by variant and guidance.

    The result is "" if there is only one step, or if no regret was measured.
    """
    if len(result.settings["scores"]["steps"]) == 1:  # there is nothing to choose
        return ""
    items = list(dict.fromkeys(row.item for row in result.select(step_rules.LAST)))
    if not items:
        return ""
    heads = ["guidance", "variant"]
    heads += [metric.title for metric in step_rules.RULES.values()]
    rows = []
    for item in items:
        for group in result.groups:
            cells = [item, group]
            for rule, metric in step_rules.RULES.items():
                cells.append(report.mean(result.summary(group, rule, item), metric))
            rows.append(cells)
    return report.section("Which step?", report.table(heads, rows))


def step_table(result: Result, name: str, item: str) -> str:
    """Return a table with a row for each variant and a column for each sampled checkpoint."""
    steps = {row.step for row in result.select(name, item=item)}
    columns = {}
    for step in result.settings["scores"]["steps"]:
        if step in steps:
            columns[f"step {step}"] = (item, step)
    return variant_table(result, name, columns)


def variant_table(result: Result, name: str, columns: Mapping[str, tuple[str, int]]) -> str:
    """Return a table of a metric with a row for each variant.

    A cell is the mean over seeds, with the difference from the control in brackets.

    Args:
        result: result with the metric.
        name: name of the metric.
        columns: heading of each column -> item and step of its values.
    """
    metric = result.metric(name)
    rows = []
    for group in result.groups:
        cells = [group]
        for item, step in columns.values():
            line = result.summary(group, name, item, step)
            cell = report.mean(line, metric, intervals=False)
            if group != result.control:
                cell += f" ({report.difference(line, metric)})"
            cells.append(cell)
        rows.append(cells)
    return report.table(["variant", *columns], rows)


def curve_panels(result: Result) -> list[list[Panel]]:
    """Return panels of curves: a row for each metric, a column for each kind of guidance."""
    rows = []
    for name in CURVE_METRICS:
        panels = []
        for item in guidance_labels(result):
            if result.select(name, item=item):
                curves = [Curve(group, name, item, label=group) for group in result.groups]
                panels.append(Panel(f"{METRICS[name].title}, {item}", "cosine", curves))
        if panels:
            rows.append(panels)
    return rows


def draw_fronts(result: Result, path: Path) -> None:
    """Draw the front of each kind of guidance (`guidance_labels`), one below the other."""
    labels = guidance_labels(result)
    with plot.canvas(path, len(labels)) as (_, axes):
        for axis, label in zip(axes[:, 0], labels, strict=True):
            # One legend is enough, since a variant has the same color everywhere.
            _draw_front(axis, result, label, legend=label == labels[0])


def guidance_labels(result: Result) -> list[str]:
    """Return the labels of the kinds of guidance that have samples.

    With named conditions, a label is that of the first condition with this kind of guidance.
    """
    labels = list(dict.fromkeys(row.item for row in result.select("i2t")))
    scores = result.settings["scores"]
    if not scores.get("conditions"):
        return labels
    first_name = next(iter(scores["conditions"]))
    guidances = read_guidances(scores["guidances"])
    first_labels = [condition_label(guidance, first_name) for guidance in guidances]
    return [label for label in labels if label in first_labels]


def _draw_front(axis: Any, result: Result, label: str, legend: bool) -> None:
    """Draw similarity to the trained style over agreement with the prompt.

    Each variant is a line through its checkpoints, with error bars of one standard error over seeds
    in both directions. Similarity is the cosine with the held-out picture or, without held-out
    pictures, with the nearest training picture.

    Args:
        axis: matplotlib axes.
        result: result of a scored sweep.
        label: label of the kind of guidance.
        legend: show the names of the variants.
    """
    likeness = "truth" if result.select("truth") else "nearest"
    styles = plot.group_styles(result.groups, result.control)
    for group in result.groups:
        horizontal = result.curve(group, "i2t", label)
        vertical = result.curve(group, likeness, label)
        x, x_error = _scale_curve(horizontal)
        y, y_error = _scale_curve(vertical)
        style = {"color": styles[group]["color"], "marker": ".", "lw": 1, "elinewidth": 0.6}
        axis.errorbar(x, y, y_error, x_error, label=group, **style)
        if group == result.control:
            for i, point in enumerate(vertical):
                axis.annotate(f"{point.step}", (x[i], y[i]), fontsize=6, color="gray")
    title = f"{result.settings['experiment']}, {label}"
    plot.finish(axis, title, METRICS[likeness].title, legend, xlabel=METRICS["i2t"].title)


def _scale_curve(curve: Sequence[Summary]) -> tuple[list[float], list[float]]:
    """Return the means and standard errors of a curve of cosines, times 100."""
    means = [100 * (point.mean or 0.0) for point in curve]
    errors = [100 * (point.error or 0.0) for point in curve]
    return means, errors
