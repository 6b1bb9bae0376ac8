"""Report of a search: ``fit.json`` and ``fit.png`` beside its runs, and the lines at the end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from ...core.durable import (
    dump_json,
    strict_json,
    write_text,
)
from ...core.figures import mean_interval, new_figure
from ...core.files import counted, duration
from ...core.values import MEASURE_TITLES
from ...run import provenance
from ...run.folder import FIT, FIT_FIGURE, FIT_RECORD
from ...run.record import read_run, read_search
from .halving import Halving, Trial, lowest_point
from .space import METHOD, RATE, Candidate, arguments, title

# Number of curves in the figure.
CURVES = 5
# Highest loss in the figure, as a multiple of the choice's loss.
HIGHEST = 1.25


def write(folder: Path, settings: Mapping[str, Any], halving: Halving, is_done: bool) -> None:
    """Write ``fit.json``: the measurements so far, and at the end the choice."""
    curve_rows = []
    for candidate, curves in halving.curves.items():
        for fold, curve in enumerate(curves):
            trial = Trial(candidate, fold, max(curve))
            row = {
                "title": title(candidate),
                "name": halving.plan.folder_name(trial),
                "fold": fold + 1,
                "steps": list(curve),
                "losses": [float(losses.mean()) for losses in curve.values()],
                "options": dict(candidate),
            }
            curve_rows.append(row)
    # While the search goes on there is no choice, but the viewer shows the curves.
    choice = None
    standings = []
    if is_done:
        chosen, step = halving.choice
        curve = halving.expected_curve(chosen)
        choice = {
            "title": title(chosen),
            "steps": step,
            "loss": lowest_point(curve)[0],
            "base_loss": float(curve[0].mean()),
            "rate_edge": rate_edge(halving, chosen),
            "options": dict(chosen),
        }
        for candidate, row in halving.standings().items():
            standings.append({"title": title(candidate), **row, "options": dict(candidate)})
    content = {
        "settings": settings,
        "spent": halving.spent_steps,
        "runs": curve_rows,
        "choice": choice,
        "out": {title(candidate): reason for candidate, reason in halving.dropped.items()},
        "standings": standings,
        "versions": provenance.versions(),
    }
    write_text(folder / FIT_RECORD, dump_json(strict_json(content)[0]))


def draw(folder: Path, halving: Halving, title_of_measure: str) -> None:
    """Plot the best curves, each by its paired difference to the choice, with 95 % intervals."""
    chosen, chosen_step = halving.choice
    chosen_loss, _ = lowest_point(halving.expected_curve(chosen))
    standings = [(candidate, row) for candidate, row in halving.standings().items() if candidate]
    with new_figure(folder / FIT_FIGURE, figsize=(7, 4), layout="constrained") as figure:
        axis = figure.add_subplot(xlabel="optimizer step", ylabel=title_of_measure)
        for candidate, row in standings[:CURVES]:
            curve = halving.expected_curve(candidate, row["folds"])
            chosen_curve = halving.expected_curve(chosen, row["folds"])
            steps, means, lows, highs = [], [], [], []
            for step, losses in curve.items():
                # The samples' different levels cancel: the interval is that of differences to the
                # choice alone.
                paired = chosen_loss + losses - chosen_curve[chosen_step]
                if step == 0 or not paired.mean() < HIGHEST * chosen_loss:
                    continue
                low, high = mean_interval(paired) or (nan, nan)
                steps.append(step)
                means.append(paired.mean())
                lows.append(low)
                highs.append(high)
            (line,) = axis.plot(steps, means, marker=".", label=title(candidate))
            ends = np.array([lows, highs], dtype=float)
            axis.fill_between(steps, ends[0], ends[1], color=line.get_color(), alpha=0.12, lw=0)
        axis.axvline(
            chosen_step, color="0.3", ls=":", label=f"chosen: {counted(chosen_step, 'step')}"
        )
        axis.grid(alpha=0.3)
        axis.legend(framealpha=0.9, edgecolor="none", fontsize="small")


def lines(folder: Path, sample_noun: str) -> list[str]:
    """Report the end of a search in lines: size, choice and next ones, last run, and doubts.

    Args:
        folder: folder of a run that has ended.
        sample_noun: name of the samples in the plural, such as "images".
    """
    record: Any = read_search(folder / FIT_RECORD)
    config = read_run(folder)["config"]  # of the last run
    folds = record["settings"]["folds"]
    data = "a held-out set"
    if folds > 1:
        data = f"{folds} folds of {record['settings']['samples']} {sample_noun}"
    titles = {run["title"] for run in record["runs"]}
    configurations = counted(len(titles), "configuration")
    runs = counted(len(record["runs"]), "run")
    # The folder of a fold is one run, however often it was resumed.
    seconds = 0.0
    for run in record["runs"]:
        seconds += read_run(folder / FIT / run["name"])["wall_seconds"]
    return [
        f"fit: {data}, {configurations}, {runs} in {duration(seconds)}",
        *_standing_lines(record, folds),
        *_last_run(record, config),
        *_doubts(record, config),
    ]


def _standing_lines(record: Mapping[str, Any], folds: int) -> list[str]:
    """The choice, the next one, the best of each further method, and the command as given."""
    measure = MEASURE_TITLES[record["settings"]["measure"]]
    rows: list[tuple[str, str, str]] = []
    methods = set()
    for place, standing in enumerate(record["standings"]):
        options = standing["options"]
        method = options.get(METHOD) if options else "as given"
        # The first two candidates have a line, and the first one of each further method.
        label = str(method)
        if place < 2 and options:
            label = ("chosen", "next")[place]
        elif method in methods:
            continue
        methods.add(method)
        steps = f"{standing['title']}, {counted(standing['steps'], 'step')}"
        steps = steps.removeprefix("as given, ")
        result = f"{measure} {record['choice']['loss']:.4f}"
        if place > 0:
            result = f"{standing['difference']:+.4f}"
            if standing["interval"]:
                low, high = standing["interval"]
                result += f" ({low:.4f} to {high:.4f})"
            if standing["folds"] < folds:
                result += f", on {standing['folds']} of {folds} folds"
        rows.append((label, steps, result))
    # Columns of equal width, for a terminal.
    label_width = max(len(label) for label, _, _ in rows)
    steps_width = max(len(steps) for _, steps, _ in rows)
    return [f"{label:<{label_width}}  {steps:<{steps_width}}  {end}" for label, steps, end in rows]


def _last_run(record: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Steps of the last run if they are not the chosen ones, and the options of the same run.

    Args:
        record: content of ``fit.json``.
        config: options of the last run.
    """
    choice, settings = record["choice"], record["settings"]
    sentences = []
    # A rate that falls to zero over 2 n steps sums up to n steps at a constant rate.
    if config["max_train_steps"] != choice["steps"]:
        trained = counted(config["max_train_steps"], "step")
        chosen = counted(choice["steps"], "step")
        sentences.append(
            f"trained: {trained} at a rate that falls to zero, which sum up to {chosen} at a"
            " constant rate"
        )
    # Options that the search has derived for the last run, beside those of the candidate.
    options = dict(choice["options"])
    for name in ("lora_alpha", "lr_scheduler", "lr_warmup_steps", "max_train_steps"):
        if config[name] != settings.get(name):
            options[name] = str(config[name])
    words = shlex.join(arguments(tuple(options.items())))
    return [*sentences, f"the same without --fit: {words}"]


def _doubts(record: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """A sentence for each reason why the choice may not be the best; arguments as `_last_run`'s."""
    choice, settings = record["choice"], record["settings"]
    measure = MEASURE_TITLES[settings["measure"]]
    sentences = []
    folds = record["standings"][0]["folds"]
    base_loss = choice["base_loss"]  # None where it is not finite
    if base_loss is not None and base_loss <= choice["loss"]:
        sentences.append(
            f"no step was better than no training, which has a {measure} of"
            f" {base_loss:.4f}: lower the rates, or give other samples"
        )
    elif choice["steps"] == settings["steps"]:
        sentences.append(
            f"the {measure} still falls at the last step that was searched: raise --max_train_steps"
        )
    for standing in record["standings"]:
        is_as_given = not standing["options"]
        if is_as_given and standing["interval"] and standing["interval"][1] < 0:
            sentences.append(
                f"the command as given, {counted(standing['steps'], 'step')}, was better by"
                f" {-standing['difference']:.4f}: train without --fit, or raise --fit_budget"
            )
    edge = choice["rate_edge"]
    if edge:
        fix = "raise --fit_budget to go on"
        if config.get("fit_space"):
            fix = f"add {'lower' if edge == 'lowest' else 'higher'} ones to --fit_space"
        sentences.append(f"its rate is the {edge} that was tried: {fix}")
    if folds < settings["folds"]:
        verb = "was" if folds == 1 else "were"
        sentences.append(
            f"{folds} of {settings['folds']} folds {verb} measured: raise --fit_budget for a sure"
            " answer"
        )
    untrained = record["out"].keys() - {row["title"] for row in record["standings"]}
    if untrained:
        number = counted(len(untrained), "configuration")
        sentences.append(f"{number} could not be trained: {FIT_RECORD} has the reasons")
    return sentences


def rate_edge(halving: Halving, chosen: Candidate) -> str | None:
    """Test whether the choice's rate is at an edge of those tried with its other options.

    Returns:
        "lowest" or "highest"; None for a rate between others.
    """
    other_options = {**dict(chosen), RATE: ""}
    rates = set()
    for candidate in (*halving.curves, *halving.dropped):
        options = dict(candidate)
        if RATE in options and {**options, RATE: ""} == other_options:
            rates.add(float(options[RATE]))
    # As for `Space.next_rates`: a single rate is at no edge.
    if len(rates) < 2:
        return None
    return {min(rates): "lowest", max(rates): "highest"}.get(float(dict(chosen)[RATE]))
