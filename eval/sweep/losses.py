"""Report of a sweep on its losses, or on another logged metric: metrics, figures and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bilora_diffusion.core.values import HELDOUT_LOSS, TRAINING_GRID_LOSS

from ..results import report
from ..results.plot import Curve, Forest, Panel
from ..results.table import Entry, Metric, Result

# Metric of the result: median seconds of a training step
SECONDS = "seconds_per_step"
# Statuses of a run
FINISHED, FAILED, WAITING = "finished", "failed", "waiting"
KEY_FIGURES = ("final", "best", "equal_training")


def metrics(result: Result) -> dict[str, Metric]:
    """Return titles and formats of the metrics.

    If lower is better and all final means are below 1, values are shown times 1000.
    """
    name = result.settings["metric"]
    higher_is_better = result.settings["higher_is_better"]
    # Recorded runs may have scores but no final value.
    means = _means(result, f"final {name}") or _means(result, name)
    scale, form = 1, ".4f"
    if means and max(means) < 1 and not higher_is_better:
        scale, form = 1000, ".2f"
    make_metric = partial(Metric, higher_is_better=higher_is_better, scale=scale, form=form)

    common_loss = result.settings["equal_training"]
    loss_text = ""
    if common_loss:
        loss_text = f" ({scale * common_loss['training_loss']:{form}})"
    extreme = "highest" if higher_is_better else "lowest"
    return {
        TRAINING_GRID_LOSS: make_metric(TRAINING_GRID_LOSS),
        f"final {TRAINING_GRID_LOSS}": make_metric(f"final {TRAINING_GRID_LOSS}"),
        name: make_metric("held-out loss" if name == HELDOUT_LOSS else name),
        f"final {name}": make_metric("final"),
        f"best {name}": make_metric(f"{extreme} over training"),
        f"equal_training {name}": make_metric(f"at equal training loss{loss_text}"),
        SECONDS: Metric("seconds per step"),
    }


def _means(result: Result, name: str) -> list[float]:
    """Return the absolute values of a metric's means in all groups and at all steps."""
    means = []
    for line in result.summaries:
        if line.metric == name and line.mean is not None:
            means.append(abs(line.mean))
    return means


def has_final_values(result: Result) -> bool:
    """Return whether any run has a value of the metric at the end of training."""
    return bool(result.select(f"final {result.settings['metric']}"))


def suffix(result: Result) -> str:
    """Return the scale of the metric for headings, such as " x 1000"; "" for a scale of 1."""
    scale = result.metric(result.settings["metric"]).scale
    if scale == 1:
        return ""
    return f" x {scale:g}"


def is_finished(entry: Entry) -> bool:
    """Return whether a run is finished."""
    return entry.about["status"] == FINISHED


def panels(result: Result) -> list[Panel | Forest]:
    """Return two panels: final differences from the control, and the metric over training."""
    name = result.settings["metric"]
    paired = result.settings["paired"]
    # Variants without a difference, and the reason
    missing: dict[str, str] = {}
    for group in result.groups:
        if paired.get(group) is False:
            missing[group] = "not paired"
        if not any(map(is_finished, result.members(group))):
            missing[group] = "missing"
    missing[result.control] = "control"

    # The axis label of the forest says which side is better.
    side = "right" if result.settings["higher_is_better"] else "left"
    title = f"final, minus {result.control}: mean and 95 % interval"
    xlabel = f"difference in {name}{suffix(result)}; {side} is better"
    curves = [Curve(group, name) for group in result.groups]
    return [
        Forest(title, xlabel, f"final {name}", missing),
        Panel("over training: mean and standard error over seeds", name, curves),
    ]


def notes(result: Result) -> Iterator[str]:
    """Yield the notes below the table."""
    settings = result.settings
    common_loss = settings["equal_training"]
    if common_loss:
        yield (
            "Equal training loss is the lowest training loss that all compared runs reach; the"
            f" variant {common_loss['set_by']} sets it."
        )
    lines = [result.summary(group, f"final {settings['metric']}") for group in result.groups]
    # Each interval misses the true value with a probability of 5 %.
    intervals = sum(line is not None and line.difference is not None for line in lines)
    if intervals > 2:
        yield (
            f"With {intervals} intervals in a column, expect one in twenty to miss the true value"
            " by chance alone."
        )
    for label in settings["variants"]:
        if settings["paired"].get(label) is False:
            yield (
                f"{label} did not see the same inputs as the control at every step (by the logged"
                " hashes), so it is not paired."
            )
    for run in result.subjects:
        if not is_finished(run):
            facts = run.about
            reason = ""
            if facts["error"]:
                reason = f" (exit code {facts['exit_code']}): {facts['error']}"
            yield f"Missing: {run.label}, {facts['status']}{reason}"


def count_finished(result: Result, group: str) -> str:
    """Return the number of a variant's finished runs and of all its runs, such as "4/5"."""
    runs = result.members(group)
    return f"{sum(map(is_finished, runs))}/{len(runs)}"


def introduction(result: Result) -> str:
    """Return the sentences above the table."""
    settings = result.settings
    count = len(result.settings["seeds"])
    direction = "higher" if settings["higher_is_better"] else "lower"
    seeds = "seeds" if count > 1 else "seed"
    return (
        f"`{settings['metric']}`{suffix(result)} for {settings['recipe']} ({direction} is better):"
        f" mean over {count} {seeds}. Differences from {report.escape_table_cell(result.control)}"
        f" are paired by seed, with {report.INTERVALS} and the number of seeds in which the variant"
        " is better."
    )
