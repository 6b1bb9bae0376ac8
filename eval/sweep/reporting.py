"""Scale of a sweep's numbers, facts of its table, and sentences around it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from .. import report
from ..plot import Curve, Forest, Panel
from ..table import Entry, Metric, Result

HELDOUT, TRAINING, SECONDS = "heldout_loss", "train_grid_loss", "seconds_per_step"
FINISHED = "finished"
KEY_FIGURES = ("final", "best", "equal_training")


def metrics(result: Result) -> dict[str, Metric]:
    """Forms of the metric: losses below 1 times 1000, with two places, others with four."""
    name, higher = result.settings["metric"], result.settings["higher_is_better"]
    lines = [result.summary(group, f"final {name}") for group in result.groups]
    means = [abs(line.mean) for line in lines if line is not None and line.mean is not None]
    small = bool(means) and max(means) < 1 and not higher
    scale, form = (1000, ".2f") if small else (1, ".4f")
    shown = partial(Metric, higher_is_better=higher, scale=scale, form=form)
    level = result.settings["equal_training"]
    at = f" ({scale * level['training_loss']:{form}})" if level else ""
    return {
        TRAINING: shown(TRAINING),
        f"final {TRAINING}": shown(f"final {TRAINING}"),
        name: shown(name),
        f"final {name}": shown("final"),
        f"best {name}": shown(f"{'highest' if higher else 'lowest'} over training"),
        f"equal_training {name}": shown(f"at equal training loss{at}"),
        SECONDS: Metric("s per step"),
    }


def suffix(result: Result) -> str:
    """The scale of the metric, for headings."""
    scale = result.metric(result.settings["metric"]).scale
    return "" if scale == 1 else f" x {scale:g}"


def is_finished(entry: Entry) -> bool:
    """Test that a run is finished."""
    return entry.about["status"] == FINISHED


def panels(result: Result) -> list[Panel | Forest]:
    """Last differences to the control, and the metric over training; a variant has one color."""
    name, paired = result.settings["metric"], result.settings["paired"]
    unpaired = [group for group, same in paired.items() if same is False]
    unfinished = [g for g in result.groups if not any(map(is_finished, result.members(g)))]
    missing = dict.fromkeys(unpaired, "not paired") | dict.fromkeys(unfinished, "missing")
    side = "right" if result.settings["higher_is_better"] else "left"
    title = f"final, minus {result.control}: mean and 95 % interval"
    xlabel = f"difference of {name}{suffix(result)}; {side} is better"
    missing[result.control] = "control"
    curves = [Curve(group, name) for group in result.groups]
    over_training = "over training: mean and standard error over seeds"
    return [Forest(title, xlabel, f"final {name}", missing), Panel(over_training, name, curves)]


def notes(result: Result) -> Iterator[str]:
    """Sentences that a reader of the table has to know."""
    settings = result.settings
    if level := settings["equal_training"]:
        yield (
            "Equal training loss is the lowest that all paired runs reach; it is set by"
            f" {level['set_by']}."
        )
    lines = [result.summary(group, f"final {settings['metric']}") for group in result.groups]
    others = sum(line is not None and line.difference is not None for line in lines)
    if others > 2:
        yield (
            f"With {others} intervals in a column, one in twenty misses its value by chance alone."
        )
    for label, variant in settings["arms"].items():
        if settings["paired"].get(label) is False:
            yield (
                f"{label} has not the control's inputs at each step (by their digests), so it can't"
                " be paired."
            )
        if variant["also"]:
            yield f"{', '.join(variant['also'])}: the same run as {label}, trained once."
    for cell in result.subjects:
        if not is_finished(cell):
            facts = cell.about
            why = f" (exit code {facts['exit_code']}): {facts['error']}" if facts["error"] else ""
            yield f"Missing: {cell.label}, {facts['status']}{why}"


def finished(result: Result, group: str) -> str:
    """Finished runs of a variant, of how many."""
    cells = result.members(group)
    return f"{sum(map(is_finished, cells))}/{len(cells)}"


def introduction(result: Result) -> str:
    """Sentence above the table."""
    settings, count = result.settings, len(result.settings["seeds"])
    return (
        f"`{settings['metric']}`{suffix(result)} of {settings['recipe']},"
        f" {'higher' if settings['higher_is_better'] else 'lower'} is better: mean over {count}"
        f" seed{'s' if count > 1 else ''}. Difference: to {report.escaped(result.control)}, paired"
        f" by seed, with {report.INTERVALS} and the number of seeds in which the variant is better."
    )
