"""Files of a fit beside its runs: ``fit.json``, ``fit.png``, and the lines at the end."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from ...durable import dump_json, replacing, strict_json, write_text
from ...intervals import student_interval
from ...run import provenance
from ...run.durations import duration
from ...run.folder import FIT, FIT_FIGURE, FIT_RECORD
from ...run.record import read_fit, read_run
from .search import Search, Work, lowest
from .space import METHOD, Options, title

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
        choice = described(chosen, steps=step, loss=lowest(search.expected(chosen))[0])
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
    axis.axvline(step, color="0.3", ls=":", label=f"chosen: {step} steps")
    axis.grid(alpha=0.3)
    axis.legend(framealpha=0.9, edgecolor="none", fontsize="small")
    with replacing(folder / FIT_FIGURE) as aside:
        figure.savefig(aside, dpi=120)


def lines(folder: Path, what: str) -> list[str]:
    """The end of a fit in lines: how many ``what``, as "images", the choice, and what is next."""
    record: Any = read_fit(folder / FIT_RECORD)
    runs, folds, loss = record["runs"], record["settings"]["folds"], record["choice"]["loss"]
    count, samples = len({run["title"] for run in runs}), record["settings"]["samples"]
    where = f"{folds} folds of {samples} {what}" if folds > 1 else "a held-out set"
    seconds = sum(read_run(folder / FIT / run["name"])["wall_seconds"] for run in runs)
    rows, seen = [], set()
    for place, row in enumerate(record["standings"]):
        method = row["options"].get(METHOD) if row["options"] else "as given"
        label = ("chosen", "next")[place] if place < 2 and row["options"] else str(method)
        if label in ("chosen", "next") or method not in seen:
            within = " ({:.4f} to {:.4f})".format(*row["interval"]) if row["interval"] else ""
            part = f", on {row['folds']} of {folds} folds" if row["folds"] < folds else ""
            gap = f"{row['difference']:+.4f}{within}{part}"
            steps = f"{row['title']}, {row['steps']} steps".removeprefix("as given, ")
            rows.append((label, steps, gap if place else f"held-out loss {loss:.4f}"))
            seen.add(method)
    wide, wider, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        f"fit: {where}, {count} configurations, {len(runs)} runs in {duration(seconds)}",
        *(f"{label:<{wide}}  {steps:<{wider}}  {end}" for label, steps, end in rows),
    ]
