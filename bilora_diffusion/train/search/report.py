"""Files of a fit beside its runs: ``fit.json``, ``fit.png``, and the lines at the end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from ...core.durable import (
    dump_json,
    replacing,
    strict_json,
    write_text,
)
from ...core.files import counted, duration
from ...core.intervals import student_interval
from ...run import provenance
from ...run.folder import FIT, FIT_FIGURE, FIT_RECORD
from ...run.record import read_fit, read_run
from .halving import Search, Work, lowest
from .space import (
    METHOD,
    RATE,
    Options,
    title,
    words,
)

SHOWN, HIGHEST = 5, 1.25  # curves in the figure; what they are drawn up to, of the chosen loss


def write(folder: Path, settings: Mapping[str, Any], search: Search, done: bool) -> None:
    """Write ``fit.json``: what was measured so far, and where that is done, what was chosen."""

    def described(options: Options, **values: Any) -> dict[str, Any]:
        return {"title": title(options), **values, "options": dict(options)}

    curves = []
    for options, own in search.curves.items():
        for fold, curve in enumerate(own):
            steps, losses = [*curve], [float(values.mean()) for values in curve.values()]
            run = {"name": search.plan.name(Work(options, fold, steps[-1])), "fold": fold + 1}
            curves.append(described(options, **run, steps=steps, losses=losses))
    standings, choice = search.standings() if done else {}, None
    if standings:
        chosen, step = search.chosen
        curve = search.expected(chosen)
        doubts = {"base_loss": float(curve[0].mean()), "rate_edge": rate_edge(search, chosen)}
        choice = described(chosen, steps=step, loss=lowest(curve)[0], **doubts)
    content = {
        **{"settings": settings, "spent": search.spent, "runs": curves, "choice": choice},
        "out": {title(options): reason for options, reason in search.out.items()},
        "standings": [described(options, **row) for options, row in standings.items()],
        "versions": provenance.versions(),
    }
    write_text(folder / FIT_RECORD, dump_json(strict_json(content)[0]))


def draw(folder: Path, search: Search) -> None:
    """Draw the best curves, each by its paired difference to the choice, with 95 % intervals."""
    from matplotlib.figure import Figure  # here, as it takes a while and fits are rare

    chosen, step = search.chosen
    loss, _ = lowest(search.expected(chosen))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.add_subplot(xlabel="optimizer step", ylabel="held-out loss")
    for options, row in [pair for pair in search.standings().items() if pair[0]][:SHOWN]:
        one, other = (search.expected(o, row["folds"]) for o in (options, chosen))
        losses = {at: loss + one[at] - other[step] for at in one if at > 0}
        near = {at: values for at, values in losses.items() if values.mean() < HIGHEST * loss}
        means = [values.mean() for values in near.values()]
        (line,) = axis.plot([*near], means, marker=".", label=title(options))
        ends = [student_interval(values) or (nan, nan) for values in near.values()]
        low, high = np.array(ends).reshape(-1, 2).T
        axis.fill_between([*near], low, high, color=line.get_color(), alpha=0.12, lw=0)
    axis.axvline(step, color="0.3", ls=":", label=f"chosen: {counted(step, 'step')}")
    axis.grid(alpha=0.3)
    axis.legend(framealpha=0.9, edgecolor="none", fontsize="small")
    with replacing(folder / FIT_FIGURE) as aside:
        figure.savefig(aside, dpi=120)


def lines(folder: Path, samples_name: str) -> list[str]:
    """The end of a fit in lines: its size, the choice and what is next, what was trained with the
    choice, and what makes it unsure.

    Args:
        folder: of a run that has ended.
        samples_name: such as "images".
    """
    record: Any = read_fit(folder / FIT_RECORD)
    runs, folds, loss = record["runs"], record["settings"]["folds"], record["choice"]["loss"]
    count, samples = len({run["title"] for run in runs}), record["settings"]["samples"]
    where = f"{folds} folds of {samples} {samples_name}" if folds > 1 else "a held-out set"
    seconds = sum(read_run(folder / FIT / run["name"])["wall_seconds"] for run in runs)
    rows, seen = [], set()
    for place, row in enumerate(record["standings"]):
        method = row["options"].get(METHOD) if row["options"] else "as given"
        label = ("chosen", "next")[place] if place < 2 and row["options"] else str(method)
        if label in ("chosen", "next") or method not in seen:
            within = " ({:.4f} to {:.4f})".format(*row["interval"]) if row["interval"] else ""
            part = f", on {row['folds']} of {folds} folds" if row["folds"] < folds else ""
            gap = f"{row['difference']:+.4f}{within}{part}"
            steps = f"{row['title']}, {counted(row['steps'], 'step')}".removeprefix("as given, ")
            rows.append((label, steps, gap if place else f"held-out loss {loss:.4f}"))
            seen.add(method)
    wide, wider, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    configurations, number = counted(count, "configuration"), counted(len(runs), "run")
    return [
        f"fit: {where}, {configurations}, {number} in {duration(seconds)}",
        *(f"{label:<{wide}}  {steps:<{wider}}  {end}" for label, steps, end in rows),
        *_last_run(record, read_run(folder)["config"]),
        *_doubts(record),
    ]


def _last_run(record: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Steps that the last run took for the chosen ones, and the options that make it again.

    Args:
        record: ``fit.json``.
        config: options of the last run.
    """
    choice, settings, sentences = record["choice"], record["settings"], []
    if config["max_train_steps"] != choice["steps"]:
        trained = counted(config["max_train_steps"], "step")
        chosen = counted(choice["steps"], "step")
        sentences.append(
            f"trained: {trained} at a rate that falls to zero, which sum up to {chosen} at a"
            " constant rate"
        )
    options = dict(choice["options"])
    for name in ("lora_alpha", "lr_scheduler", "lr_warmup_steps", "max_train_steps"):
        if config[name] != settings.get(name):
            options[name] = str(config[name])
    return [*sentences, f"the same without --fit: {shlex.join(words(tuple(options.items())))}"]


def _doubts(record: Mapping[str, Any]) -> list[str]:
    """A sentence for each reason why the choice may not be the best."""
    choice, settings, folds = record["choice"], record["settings"], record["standings"][0]["folds"]
    base_loss, sentences = choice.get("base_loss"), []  # which fits of earlier versions lack
    if base_loss is not None and base_loss <= choice["loss"]:
        sentences.append(
            "no step was better than no training, which has a held-out loss of"
            f" {base_loss:.4f}: lower the rates, or give other samples"
        )
    elif choice["steps"] == settings["steps"]:
        sentences.append(
            "the loss still falls at the last step that was searched: raise --max_train_steps"
        )
    if edge := choice.get("rate_edge"):
        sentences.append(f"its rate is the {edge} that was tried: raise --fit_budget to go on")
    if folds < settings["folds"]:
        verb = "was" if folds == 1 else "were"
        sentences.append(
            f"{folds} of {settings['folds']} folds {verb} measured: raise --fit_budget for a sure"
            " answer"
        )
    if untrained := record["out"].keys() - {row["title"] for row in record["standings"]}:
        number = counted(len(untrained), "configuration")
        sentences.append(f"{number} could not be trained: {FIT_RECORD} has the reasons")
    return sentences


def rate_edge(search: Search, chosen: Options) -> str | None:
    """The end of the rates that were tried with the choice's other options which its own rate is:
    "lowest" or "highest"; None for a rate between others.
    """
    others = {**dict(chosen), RATE: ""}
    tried = [dict(options) for options in (*search.curves, *search.out)]
    rates = {float(o[RATE]) for o in tried if RATE in o and {**o, RATE: ""} == others}
    if len(rates) < 2:
        return None
    return {min(rates): "lowest", max(rates): "highest"}.get(float(dict(chosen)[RATE]))
