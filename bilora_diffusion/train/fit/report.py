"""What a fit leaves beside its runs: ``fit.json``, ``fit.png``, and the lines at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...durable import dump_json, replacing, strict_json, write_text
from ...run import provenance
from ...run.durations import duration
from ...run.folder import FIT, FIT_FIGURE, FIT_RECORD
from ...run.record import read_fit
from ...run.runlog import read_run
from .search import Curve, Search, bootstrap_interval, lowest, pooled
from .space import METHOD, Options, title

SHOWN = 5
"""Curves in the figure."""
RESAMPLES = 999
"""Of each interval in the figure, of which there are a hundred."""


def write(
    folder: Path,
    settings: Mapping[str, Any],
    runs: Mapping[tuple[Options, int], tuple[str, Curve]],
    search: Search,
    done: bool = False,
) -> None:
    """Write ``fit.json``: what was measured so far, and in the end what was chosen.

    Args:
        runs: by configuration and fold, the run's folder and curve.
    """
    curves = [
        {
            **{"name": name, "title": title(options) or "as given", "fold": fold + 1},
            **{"options": dict(options), "steps": list(curve)},
            "losses": [float(np.mean(losses)) for losses in curve.values()],
        }
        for (options, fold), (name, curve) in runs.items()
    ]
    choice, standings = None, []
    if done:
        options, step = search.chosen
        loss = float(pooled(search.curves[options])[step].mean())
        choice = {"options": dict(options), "title": title(options), "steps": step, "loss": loss}
        standings = [
            {
                **{"options": dict(row.options), "title": title(row.options)},
                **{"steps": row.step, "folds": row.folds, "difference": row.difference},
                "interval": None if row.interval is None else list(row.interval),
            }
            for row in search.standings()
        ]
    content = {
        **{"settings": settings, "spent": search.spent, "runs": curves},
        "out": {title(options): reason for options, reason in search.out.items()},
        **{"choice": choice, "standings": standings, "versions": provenance.versions()},
    }
    write_text(folder / FIT_RECORD, dump_json(strict_json(content)[0]))


def draw(folder: Path, search: Search) -> None:
    """Draw the best curves as ``fit.png``: each by its difference to the choice, paired by sample,
    with its 95 % interval.
    """
    from matplotlib.figure import Figure  # here, as it takes a while and fits are rare

    chosen, step = search.chosen
    loss = lowest(pooled(search.curves[chosen]))[0]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.add_subplot()
    for row in [row for row in search.standings() if row.options][:SHOWN]:
        one, other = (pooled(search.curves[o][: row.folds]) for o in (row.options, chosen))
        steps = [at for at in one if at > 0]
        differences = [one[at] - other[step] for at in steps]
        means = [loss + float(values.mean()) for values in differences]
        (line,) = axis.plot(steps, means, marker=".", label=title(row.options) or "as given")
        if row.options != chosen:
            intervals = [bootstrap_interval(values, resamples=RESAMPLES) for values in differences]
            if all(intervals):
                low, high = zip(
                    *((loss + i.low, loss + i.high) for i in intervals if i), strict=True
                )
                axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, lw=0)
    axis.axvline(step, color="0.3", ls=":")
    axis.axhline(loss, color="0.3", ls=":", label=f"chosen: {step} steps")
    axis.set(xlabel="optimizer step", ylabel="held-out loss", ylim=_limits(axis, loss))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    with replacing(folder / FIT_FIGURE) as aside:
        figure.savefig(aside, dpi=120)


def _limits(axis: Any, loss: float) -> tuple[float, float]:
    """From below the lowest point to where the first steps of slow runs are cut off."""
    ends = [float(value) for line in axis.get_lines() for value in line.get_ydata()]
    low = min(min(ends), loss)
    return low - 0.02 * loss, min(max(ends), loss * 1.25) + 0.02 * loss


def lines(folder: Path, what: str) -> list[str]:
    """The end of a fit in lines: how much was searched, what was chosen, and what is next to it.

    Args:
        what: the samples are called, such as "images".
    """
    record = read_fit(folder / FIT_RECORD)
    assert record is not None
    first, *others = record["standings"]
    settings, folds = record["settings"], record["settings"]["folds"]
    seconds = sum(read_run(folder / FIT / run["name"])["wall_seconds"] for run in record["runs"])
    where = f"{folds} folds of {settings['samples']} {what}" if folds > 1 else "a held-out set"
    configurations = len({run["title"] for run in record["runs"]})
    rows = [("chosen", first)]
    searched = [row for row in others if row["options"]]
    rows += [("next", row) for row in searched[:1]]
    seen = {row["options"].get(METHOD) for _, row in rows}
    for row in searched:
        if (method := row["options"].get(METHOD)) not in seen:
            seen.add(method)
            rows.append((str(method), row))
    rows += [("as given", row) for row in others if not row["options"]]
    texts = [(label, _what(row), _how(row, record, folds)) for label, row in rows]
    first_width, second_width = (max(len(text[i]) for text in texts) for i in (0, 1))
    return [
        f"fit: {where}, {configurations} configurations, {len(record['runs'])} runs in"
        f" {duration(seconds)}",
        *(f"{a:<{first_width}}  {b:<{second_width}}  {c}" for a, b, c in texts),
        *(
            f"out: {name}: {reason}"
            for name, reason in record["out"].items()
            if "worse" not in reason
        ),
    ]


def _what(row: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (row["title"], f"{row['steps']} steps")))


def _how(row: Mapping[str, Any], record: Mapping[str, Any], folds: int) -> str:
    if row is record["standings"][0]:
        return f"held-out loss {record['choice']['loss']:.4f}"
    interval = row["interval"]
    within = f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
    part = f", on {row['folds']} of {folds} folds" if row["folds"] < folds else ""
    return f"{row['difference']:+.4f}{within}{part}"
