"""Subjects: run folders, files of adapters and the base model, and the groups of repeats.

gather(["runs/a", "runs/b"], ["rho 1=runs/c,runs/d"])    # groups of runs that differ in the seed
single(["LoRA=runs/a", "owner/name", "base"])            # each a group of its own
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bilora_diffusion.core.errors import UserError

from .sources import BASE, Subject, find, run

__all__ = ["BASE", "Subject", "by_group", "gather", "paired", "read_groups", "single"]


def read_groups(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Label and runs of each ``--group``."""
    groups = []
    for word in words:
        label, equals, rest = word.partition("=")
        runs = [run.strip() for run in rest.split(",")]
        if not (equals and label.strip() and all(runs)):
            raise UserError(f'--group "{word}" names no runs: write LABEL=RUN,RUN.')
        groups.append((label.strip(), runs))
    return groups


def gather(
    words: Sequence[str], groups: Sequence[str] = (), weights: bool = False
) -> list[Subject]:
    """The subjects that a command line means, group by group.

    Args:
        words: run folders; those of one method and setting form a group, labelled by the method's
            title and whatever tells it from the others of that method.
        groups: "LABEL=RUN,RUN" each, for runs that are to stand together under a name.
        weights: the weights are needed: they and their digest are filled in, and files of adapters
            and "base" may be named too.
    """
    named = read_groups(groups)
    if not words and not named:
        raise UserError("no runs are given: name run folders, or use --group LABEL=RUN,RUN.")
    _refuse_twice([*words, *(word for _, runs in named for word in runs)])
    subjects = _by_setting([_open(word, weights) for word in words])
    labels = list(dict.fromkeys(subject.group for subject in subjects))
    for label, runs in named:
        subjects += [replace(_open(word, weights), group=label) for word in runs]
        labels.append(label)
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f'two groups are called "{label}": give one another name by --group.')
        _check_group(label, [one for one in subjects if one.group == label])
    order = {label: place for place, label in enumerate(labels)}
    subjects.sort(key=lambda subject: (order[subject.group], subject.seed or 0))
    labels = _unique([subject.label for subject in subjects])
    return [replace(one, label=label) for one, label in zip(subjects, labels, strict=True)]


def single(words: Sequence[str], weights: bool = True) -> list[Subject]:
    """Subjects, by default with weights, each a group of its own, perhaps given as LABEL=WORD.

    Without a label it is called by its method's title, with its folder's name where two would be
    called alike.
    """
    pairs = [_split(word) for word in words]
    given = Counter(label for label, _ in pairs if label is not None)
    if repeated := [label for label, count in given.items() if count > 1]:
        raise UserError(f'the label "{repeated[0]}" is given twice: give each adapter its own.')
    _refuse_twice([word for _, word in pairs])
    subjects = [_open(word, weights) for _, word in pairs]
    titles = [label or one.group for (label, _), one in zip(pairs, subjects, strict=True)]
    names = [
        f"{title} ({one.label})" if titles.count(title) > 1 and title != one.label else title
        for title, one in zip(titles, subjects, strict=True)
    ]
    unlabelled = [name for name, (label, _) in zip(names, pairs, strict=True) if label is None]
    free = iter(_unique(unlabelled, given, " "))
    labels = [label or next(free) for label, _ in pairs]
    return [replace(one, label=n, group=n) for one, n in zip(subjects, labels, strict=True)]


def by_group(subjects: Sequence[Subject]) -> dict[str, list[Subject]]:
    """The subjects of each group, in order."""
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(subject.group, []).append(subject)
    return groups


def paired(subjects: Sequence[Subject], control: str) -> dict[str, bool | None]:
    """Group -> True if its runs saw the control's inputs at each step that both took, seed by seed.

    None for the control, and where no seed has both; a run without digests is not paired.
    """
    groups = by_group(subjects)
    others = {subject.seed: _digests(subject) for subject in groups[control]}
    pairs: dict[str, bool | None] = {}
    for group, runs in groups.items():
        common = [run for run in runs if run.seed in others and group != control]
        same = [_same(_digests(run), others[run.seed]) for run in common]
        pairs[group] = all(same) if same else None
    return pairs


def _digests(subject: Subject) -> dict[int, str]:
    return {line["step"]: line["digest"] for line in subject.log() if line.get("digest")}


def _same(one: Mapping[int, str], other: Mapping[int, str]) -> bool:
    steps = one.keys() & other.keys()
    return bool(steps) and all(one[step] == other[step] for step in steps)


def _open(word: str, weights: bool) -> Subject:
    """A subject whose label is its folder's name and whose group is its method's title."""
    return find(word) if weights else run(Path(word), word)


def _refuse_twice(words: Sequence[str]) -> None:
    places = [Path(word).resolve() for word in words]
    for word, place in zip(words, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{word} is given twice: keep one.")


def _by_setting(subjects: Sequence[Subject]) -> list[Subject]:
    """Each with its group's label: the title, and the options in which runs of a method differ."""
    runs = [subject for subject in subjects if subject.record]
    settings = {run.folder: run.settings() for run in runs}
    grouped = []
    for subject in subjects:
        options = settings.get(subject.folder, {}) if subject.record else {}
        others = [settings[run.folder] for run in runs if run.method == subject.method]
        differing = [name for name in options if any(o.get(name) != options[name] for o in others)]
        distinction = ", ".join(f"{name}={_as_text(options[name])}" for name in differing)
        label = BASE if subject.kind == BASE else subject.group
        label = f"{label} ({distinction})" if distinction else label
        grouped.append(replace(subject, group=label))
    return grouped


def _as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def _check_group(label: str, members: Sequence[Subject]) -> None:
    methods = sorted({subject.method for subject in members if subject.method})
    if len(methods) > 1:
        raise UserError(
            f'the group "{label}" mixes {" and ".join(methods)}: give each method a group.'
        )
    seeds: dict[int, Subject] = {}
    for subject in members:
        if subject.seed is None:
            continue
        other = seeds.setdefault(subject.seed, subject)
        if other is not subject:
            raise UserError(
                f"{other.folder} and {subject.folder} are both seed {subject.seed} of"
                f' "{label}": leave one out, or give it a name of its own by --group LABEL=RUN.'
            )


def _unique(names: Sequence[str], taken: Iterable[str] = (), before: str = "-") -> list[str]:
    """The names, with a number where one is taken already."""
    used, unique = set(taken), []
    for name in names:
        number, free = 1, name
        while free in used:
            number += 1
            free = f"{name}{before}{number}"
        used.add(free)
        unique.append(free)
    return unique


def _split(word: str) -> tuple[str | None, str]:
    label, equals, rest = word.partition("=")
    if not equals or "/" in label or Path(word).expanduser().exists():
        return None, word
    label, rest = " ".join(label.split()), rest.strip()
    if not label or not rest:
        raise UserError(f'"{word}" lacks a label or an adapter: write LABEL=ADAPTER.')
    return label, rest
