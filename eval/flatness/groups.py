"""Runs summed up over their seeds, and compared with the control's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..statistics import bootstrap_interval, columns, mean, paired_difference
from .result import GroupResult, GroupSpace, RunResult, Summary, numbers

Figure = Callable[[RunResult], float | None]


def summarize(entries: Sequence[RunResult], control: str) -> list[GroupResult]:
    """One row per group, in the order of the entries.

    Args:
        entries: all runs.
        control: label of the group that the others are compared with.
    """
    labels = list(dict.fromkeys(entry.group for entry in entries))
    own = {label: [entry for entry in entries if entry.group == label] for label in labels}
    return [_group(label, own[label], own[control], label == control) for label in labels]


def _group(
    label: str, runs: Sequence[RunResult], control: Sequence[RunResult], is_control: bool
) -> GroupResult:
    def summary(figure: Figure) -> Summary:
        values = numbers([figure(run) for run in runs])
        pair = None if is_control else _paired(runs, control, figure)
        return Summary(mean(values), bootstrap_interval(values), pair)

    def of(space: str, name: str) -> Figure:
        return lambda run: getattr(run.spaces[space], name) if space in run.spaces else None

    spaces = {}
    for space in dict.fromkeys(name for run in runs for name in run.spaces):
        own = [run for run in runs if space in run.spaces]
        means = [columns(run.spaces[space].profiles)[0] for run in own]
        profile, band = columns(means if len(own) > 1 else own[0].spaces[space].profiles)
        rises = [] if is_control else _rises_above(own, control, space)
        difference, difference_band = columns(rises) if rises else (None, None)
        figures = {name: summary(of(space, name)) for name in ("rise", "sharpness", "eigenvalue")}
        spaces[space] = GroupSpace(profile, band, difference, difference_band, **figures)
    return GroupResult(
        label=label,
        runs=[run.label for run in runs],
        seeds=[run.seed for run in runs],
        loss=summary(lambda run: run.loss),
        spaces=spaces,
    )


def _paired(runs: Sequence[RunResult], control: Sequence[RunResult], figure: Figure):
    def by_seed(own: Sequence[RunResult]) -> dict[int, float]:
        pairs = [(run.seed, figure(run)) for run in own]
        return {seed: value for seed, value in pairs if seed is not None and value is not None}

    return paired_difference(by_seed(runs), by_seed(control))


def _rises_above(
    runs: Sequence[RunResult], control: Sequence[RunResult], space: str
) -> list[list[float | None]]:
    """Rise from the middle minus that of the control's run of the same seed, a row per seed."""
    others = {run.seed: run for run in control if space in run.spaces and run.seed is not None}
    rows = []
    for run in runs:
        if run.seed in others:
            pair = [_rise(own.spaces[space].profiles) for own in (run, others[run.seed])]
            rows.append(
                [None if a is None or b is None else a - b for a, b in zip(*pair, strict=True)]
            )
    return rows


def _rise(profiles: Sequence[Sequence[float | None]]) -> list[float | None]:
    means = columns(profiles)[0]
    middle = means[len(means) // 2]
    return [None if v is None or middle is None else v - middle for v in means]
