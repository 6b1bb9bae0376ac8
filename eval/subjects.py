"""Subjects: run folders, files of adapters and the base model, and the groups of repeats.

gather(["runs/a", "runs/b"], ["rho 1=runs/c,runs/d"])    # groups of runs that differ in the seed
single(["LoRA=runs/a", "owner/name", "base"])            # each a group of its own
"""

from __future__ import annotations

import itertools
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bilora_diffusion import methods
from bilora_diffusion.core.errors import UserError

from .sources import BASE, Subject, find, run

__all__ = [
    "BASE",
    "Subject",
    "by_group",
    "differing_options",
    "gather",
    "paired",
    "read_groups",
    "settings_note",
    "single",
]

PLAIN_NAMES = {
    "dataset_name": "data",
    "instance_data_dir": "data folder",
    "max_train_steps": "steps",
    "num_train_epochs": "epochs",
    "pretrained_model_name_or_path": "base model",
}
"""What options are called in a sentence; the others by their own names."""
SETTING_WIDTH = 40


def read_groups(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Label and runs of each ``--group``."""
    groups = []
    for word in words:
        label, equals, members = word.partition("=")
        runs = [run.strip() for run in members.split(",")]
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
    labelled_groups = read_groups(groups)
    if not words and not labelled_groups:
        raise UserError("no runs are given: name run folders, or use --group LABEL=RUN,RUN.")
    words_of_groups: list[str] = []
    for _, runs in labelled_groups:
        words_of_groups += runs
    _refuse_twice([*words, *words_of_groups])

    subjects = _by_setting([_open(word, weights) for word in words])
    labels = list(dict.fromkeys(subject.group for subject in subjects))
    for label, runs in labelled_groups:
        subjects += [replace(_open(word, weights), group=label) for word in runs]
        labels.append(label)
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f'two groups are called "{label}": give one another name by --group.')
        _check_group(label, [subject for subject in subjects if subject.group == label])
    # Groups stand in the order of the command line, their runs in the order of their seeds.
    order = {label: place for place, label in enumerate(labels)}
    subjects.sort(key=lambda subject: (order[subject.group], subject.seed or 0))
    labels = _unique([subject.label for subject in subjects])
    return [replace(subject, label=label) for subject, label in zip(subjects, labels, strict=True)]


def single(words: Sequence[str], weights: bool = True) -> list[Subject]:
    """Subjects, by default with weights, each a group of its own, perhaps given as LABEL=WORD.

    Without a label it is called by its method's title, with its folder's name where two would be
    called alike.
    """
    pairs = [_split(word) for word in words]
    user_labels = Counter(label for label, _ in pairs if label is not None)
    for label, count in user_labels.items():
        if count > 1:
            raise UserError(f'the label "{label}" is given twice: give each adapter its own.')
    _refuse_twice([word for _, word in pairs])

    subjects = [_open(word, weights) for _, word in pairs]
    titles: list[str] = []
    for (label, _), subject in zip(pairs, subjects, strict=True):
        titles.append(label or subject.group)
    names: list[str] = []
    for (label, _), title, subject in zip(pairs, titles, subjects, strict=True):
        if label is None:
            is_ambiguous = titles.count(title) > 1 and title != subject.label
            names.append(f"{title} ({subject.label})" if is_ambiguous else title)

    unique_names = iter(_unique(names, user_labels, " "))
    labelled: list[Subject] = []
    for (label, _), subject in zip(pairs, subjects, strict=True):
        name = label or next(unique_names)
        labelled.append(replace(subject, label=name, group=name))
    return labelled


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
    control_digests = {subject.seed: _digests(subject) for subject in groups[control]}
    pairs: dict[str, bool | None] = {}
    for group, members in groups.items():
        matches: list[bool] = []
        for subject in members:
            if group != control and subject.seed in control_digests:
                digests = _digests(subject)
                matches.append(_agree(digests, control_digests[subject.seed]))
        pairs[group] = all(matches) if matches else None
    return pairs


def _digests(subject: Subject) -> dict[int, str]:
    return {line["step"]: line["digest"] for line in subject.log() if line.get("digest")}


def _agree(digests: Mapping[int, str], control_digests: Mapping[int, str]) -> bool:
    steps = digests.keys() & control_digests.keys()
    return bool(steps) and all(digests[step] == control_digests[step] for step in steps)


def _open(word: str, weights: bool) -> Subject:
    """A subject whose label is its folder's name and whose group is its method's title."""
    return find(word) if weights else run(Path(word), word)


def _refuse_twice(words: Sequence[str]) -> None:
    places = [Path(word).resolve() for word in words]
    for word, place in zip(words, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{word} is given twice: keep one.")


def differing_options(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The options that some configurations do not share -> the value in each; None where it has
    none.
    """
    values: dict[str, list[Any]] = {}
    for name in dict.fromkeys(itertools.chain(*configs)):
        of_each = [config.get(name) for config in configs]
        if any(value != of_each[0] for value in of_each):
            values[name] = of_each
    return values


def settings_note(subjects: Sequence[Subject]) -> str:
    """One sentence on the settings in which runs differ that all of their methods read, such as
    "LoRA, Bi-LoRA differ in: steps 40 / 500, rank 8 / 4."; "" where they do not.
    """
    runs: dict[Path, Subject] = {}
    for subject in subjects:
        if subject.folder is not None and subject.method in methods.names():
            runs.setdefault(subject.folder, subject)
    settings = [run.settings() for run in runs.values()]
    shared_names = set(settings[0]).intersection(*settings) if settings else set[str]()
    comparable = [{name: run[name] for name in sorted(shared_names)} for run in settings]
    differences = []
    for name, values in differing_options(comparable).items():
        texts = [textwrap.shorten(_as_text(value), SETTING_WIDTH) for value in values]
        differences.append(f"{PLAIN_NAMES.get(name, name)} {' / '.join(texts)}")
    if not differences:
        return ""
    labels = [str(run.about.get("run", run.label)) for run in runs.values()]
    return f"{', '.join(labels)} differ in: {', '.join(differences)}."


def _by_setting(subjects: Sequence[Subject]) -> list[Subject]:
    """Each with its group's label: the title, and the options in which runs of a method differ."""
    runs = [subject for subject in subjects if subject.record]
    settings = {run.folder: run.settings() for run in runs}
    grouped = []
    for subject in subjects:
        options = settings.get(subject.folder, {}) if subject.record else {}
        peers = [settings[run.folder] for run in runs if run.method == subject.method]
        differing = differing_options(peers)
        distinctions: list[str] = []
        for name, value in options.items():
            if name in differing:
                distinctions.append(f"{name}={_as_text(value)}")
        label = BASE if subject.kind == BASE else subject.group
        if distinctions:
            label = f"{label} ({', '.join(distinctions)})"
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
        earlier = seeds.setdefault(subject.seed, subject)
        if earlier is not subject:
            raise UserError(
                f"{earlier.folder} and {subject.folder} are both seed {subject.seed} of"
                f' "{label}": leave one out, or give it a name of its own by --group LABEL=RUN.'
            )


def _unique(names: Sequence[str], reserved: Iterable[str] = (), separator: str = "-") -> list[str]:
    """The names, with a number where one stands already."""
    assigned, unique = set(reserved), []
    for name in names:
        number, candidate = 1, name
        while candidate in assigned:
            number += 1
            candidate = f"{name}{separator}{number}"
        assigned.add(candidate)
        unique.append(candidate)
    return unique


def _split(word: str) -> tuple[str | None, str]:
    label, equals, adapter = word.partition("=")
    # A place with an equals sign in its name is no label.
    if not equals or "/" in label or Path(word).expanduser().exists():
        return None, word
    label, adapter = " ".join(label.split()), adapter.strip()
    if not label or not adapter:
        raise UserError(f'"{word}" lacks a label or an adapter: write LABEL=ADAPTER.')
    return label, adapter
