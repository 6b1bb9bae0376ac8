"""Files of a fit beside its runs: ``fit.json``, ``fit.png``, and the lines at the end."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan
from pathlib import Path
from typing import Any

from ...durable import dump_json, replacing, strict_json, write_text
from ...intervals import student_interval
from ...run import provenance
from ...run.durations import duration
from ...run.folder import FIT, FIT_FIGURE, FIT_RECORD
from ...run.record import read_fit, read_run
from .search import Search, Work, lowest
from .space import METHOD, Options, title

SHOWN = 5
"""Curves in the figure."""


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
    standings, choice = search.standings() if done else [], None
    if standings:
        chosen, step = search.chosen
        choice = described(chosen, steps=step, loss=lowest(search.expected(chosen))[0])
    content = {
        **{"settings": settings, "spent": search.spent, "runs": curves, "choice": choice},
        "out": {title(options): reason for options, reason in search.out.items()},
        "standings": [described(**row._asdict()) for row in standings],
        "versions": provenance.versions(),
    }
    write_text(folder / FIT_RECORD, dump_json(strict_json(content)[0]))


def draw(folder: Path, search: Search) -> None:
    """Draw the best curves as ``fit.png``: each by its difference to the choice, paired by sample,
    with its 95 % interval.
    """
    from matplotlib.figure import Figure  # here, as it takes a while and fits are rare

    chosen, step = search.chosen
    loss, _ = lowest(search.expected(chosen))
    figure, least = Figure(figsize=(7, 4), layout="constrained"), loss
    axis = figure.add_subplot()
    for row in [row for row in search.standings() if row.options][:SHOWN]:
        one, other = (search.expected(o, row.folds) for o in (row.options, chosen))
        differences = {at: loss + one[at] - other[step] for at in one if at > 0}
        means = [float(values.mean()) for values in differences.values()]
        (line,) = axis.plot([*differences], means, marker=".", label=title(row.options))
        least = min(least, *means)
        ends = [student_interval(values) or (nan, nan) for values in differences.values()]
        low, high = zip(*ends, strict=True)
        axis.fill_between([*differences], low, high, color=line.get_color(), alpha=0.12, lw=0)
    axis.axvline(step, color="0.3", ls=":", label=f"chosen: {step} steps")
    axis.set(xlabel="optimizer step", ylabel="held-out loss", ylim=(0.97 * least, 1.25 * loss))
    axis.grid(alpha=0.3)
    axis.legend(framealpha=0.9, edgecolor="none", fontsize="small")
    with replacing(folder / FIT_FIGURE) as aside:
        figure.savefig(aside, dpi=120)


def lines(folder: Path, what: str) -> list[str]:
    """The end of a fit in lines: how much was searched of ``what``, such as "images", what was
    chosen, and what is next to it.
    """
    record: Any = read_fit(folder / FIT_RECORD)
    runs, settings, (first, *others) = record["runs"], record["settings"], record["standings"]
    seconds = sum(read_run(folder / FIT / run["name"])["wall_seconds"] for run in runs)
    folds, count = settings["folds"], len({run["title"] for run in runs})
    where = f"{folds} folds of {settings['samples']} {what}" if folds > 1 else "a held-out set"
    loss = f"held-out loss {record['choice']['loss']:.4f}"
    rows, seen = [("chosen", first, loss)], {first["options"].get(METHOD)}
    for row in others:
        method = row["options"].get(METHOD) if row["options"] else "as given"
        label = "next" if row is others[0] and row["options"] else str(method)
        if label == "next" or method not in seen:
            within = " ({:.4f} to {:.4f})".format(*row["interval"]) if row["interval"] else ""
            part = f", on {row['folds']} of {folds} folds" if row["folds"] < folds else ""
            rows.append((label, row, f"{row['difference']:+.4f}{within}{part}"))
            seen.add(method)
    titles = [f"{r['title']}, {r['steps']} steps".removeprefix("as given, ") for _, r, _ in rows]
    wide, wider = max(len(label) for label, *_ in rows), max(map(len, titles))
    return [
        f"fit: {where}, {count} configurations, {len(runs)} runs in {duration(seconds)}",
        *(f"{a:<{wide}}  {t:<{wider}}  {end}" for (a, _, end), t in zip(rows, titles, strict=True)),
    ]
