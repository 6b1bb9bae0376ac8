"""Subjects of a command line: run folders, files of adapters and the base model, in groups.

gather(["runs/a", "runs/b"], ["rho 1=runs/c,runs/d"])    # runs of a group differ in the seed
single(["LoRA=runs/a", "file.safetensors", "base"])      # each subject is a separate group
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bilora_diffusion import methods
from bilora_diffusion.core.errors import UserError

from .sources import BASE, Subject, find, open_run

# Option -> its name in sentences; other options are called by the option's name
PLAIN_NAMES = {
    "dataset_name": "data",
    "instance_data_dir": "data folder",
    "max_train_steps": "steps",
    "num_train_epochs": "epochs",
    "pretrained_model_name_or_path": "base model",
}
# Maximum characters of an option's value in a sentence
SETTING_WIDTH = 40


def read_groups(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the label and the runs of each ``--group``."""
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
    """Return the subjects of a command line by group, and sorted by seed within a group.

    Args:
        words: run folders. Runs with the same method and settings form a group. Its label is the
            method's title and the options that differ from other groups of the method.
        groups: strings "LABEL=RUN,RUN"; each defines a group with this label.
        weights: open and hash the weights too. In this case, ``words`` and ``groups`` may also name
            files of adapters and "base".
    """
    labelled_groups = read_groups(groups)
    if not words and not labelled_groups:
        raise UserError("no runs are given: name run folders, or use --group LABEL=RUN,RUN.")
    all_words = list(words)
    for _, runs in labelled_groups:
        all_words += runs
    _refuse_repeated(all_words)

    # The runs with a label have no influence on the groups of the other runs.
    subjects = _grouped_by_settings([_open(word, weights) for word in words])
    group_labels = list(by_group(subjects))
    for label, runs in labelled_groups:
        subjects += [replace(_open(word, weights), group=label) for word in runs]
        group_labels.append(label)
    members = by_group(subjects)
    for label in group_labels:
        if group_labels.count(label) > 1:
            raise UserError(f'two groups are called "{label}": rename one of them by --group.')
        _check_group(label, members[label])

    ordered = []
    for label in group_labels:
        ordered += sorted(members[label], key=lambda subject: subject.seed or 0)
    # Run folders of different parents may have the same name.
    names = _unique([subject.label for subject in ordered])
    return [replace(subject, label=name) for subject, name in zip(ordered, names, strict=True)]


def single(words: Sequence[str], weights: bool = True) -> list[Subject]:
    """Return subjects that each form a separate group.

    Args:
        words: the subjects; a word may be LABEL=SUBJECT. Without a label, a subject is named by its
            method's title, followed by the name of its folder or file if another subject has the
            same title.
        weights: open and hash the weights too.
    """
    pairs = [_split_label(word) for word in words]
    user_labels = [label for label, _ in pairs if label is not None]
    for label in user_labels:
        if user_labels.count(label) > 1:
            raise UserError(f'the label "{label}" is given twice: use different labels.')
    _refuse_repeated([word for _, word in pairs])

    subjects = []
    for label, word in pairs:
        subject = _open(word, weights)
        subjects.append(replace(subject, group=label or subject.group))
    titles = [subject.group for subject in subjects]
    names: list[str] = []
    labelled: list[Subject] = []
    for (label, _), subject in zip(pairs, subjects, strict=True):
        name = subject.group
        # The user's labels are not changed; other names are extended until all names differ.
        if label is None:
            if titles.count(name) > 1 and name != subject.label:
                name = f"{name} ({subject.label})"
            name = _make_unique(name, [*user_labels, *names], separator=" ")
        names.append(name)
        labelled.append(replace(subject, label=name, group=name))
    return labelled


def by_group(subjects: Sequence[Subject]) -> dict[str, list[Subject]]:
    """Return the subjects of each group, in the given order."""
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(subject.group, []).append(subject)
    return groups


def check_pairing(subjects: Sequence[Subject], control: str) -> dict[str, bool | None]:
    """Check which groups saw the same inputs as the control, by the logged hashes of the inputs.

    Runs with the same seed are compared, at all steps that both runs have.

    Returns:
        Group -> True if all hashes are equal; False if hashes differ or are missing; None for the
        control, and for a group without a seed of the control's runs.
    """
    groups = by_group(subjects)
    control_hashes = {subject.seed: _input_hashes(subject) for subject in groups[control]}
    pairs: dict[str, bool | None] = {}
    for group, members in groups.items():
        pairs[group] = None
        for subject in members:
            if group == control or subject.seed not in control_hashes:
                continue
            hashes, expected = _input_hashes(subject), control_hashes[subject.seed]
            common_steps = hashes.keys() & expected.keys()
            is_same = all(hashes[step] == expected[step] for step in common_steps)
            if not common_steps or not is_same:
                pairs[group] = False
                break
            pairs[group] = True
    return pairs


def _input_hashes(subject: Subject) -> dict[int, str]:
    """Return the hash of the run's batch and noise for each step."""
    return {line["step"]: line["digest"] for line in subject.log() if line.get("digest")}


def _open(word: str, weights: bool) -> Subject:
    """Open a subject; without ``weights``, the word must name a run folder."""
    if weights:
        return find(word)
    return open_run(Path(word), word)


def _refuse_repeated(words: Sequence[str]) -> None:
    """Raise UserError if a folder or file is named twice, even by different paths."""
    paths = [Path(word).resolve() for word in words]
    for word, path in zip(words, paths, strict=True):
        if paths.count(path) > 1:
            raise UserError(f"{word} is given twice: keep one.")


def differing_options(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the options that differ between configurations, with their value in each.

    The value is None in a configuration without the option.
    """
    differing: dict[str, list[Any]] = {}
    for name in dict.fromkeys(itertools.chain(*configs)):
        values = [config.get(name) for config in configs]
        if any(value != values[0] for value in values):
            differing[name] = values
    return differing


def settings_note(subjects: Sequence[Subject]) -> str:
    """Return a sentence on the settings that differ between runs.

    Only settings that all of the runs' methods read are compared. An example is "LoRA, Bi-LoRA
    differ in: steps 40 / 500, rank 8 / 4."; without a difference, the sentence is "".
    """
    runs: dict[Path, Subject] = {}
    for subject in subjects:
        if subject.folder is not None and subject.method in methods.names():
            runs.setdefault(subject.folder, subject)
    settings = [run.settings() for run in runs.values()]
    differences = []
    for name, values in sorted(differing_options(settings).items()):
        is_read_by_all = all(name in options for options in settings)
        if is_read_by_all:
            texts = [textwrap.shorten(_as_text(value), SETTING_WIDTH) for value in values]
            differences.append(f"{PLAIN_NAMES.get(name, name)} {' / '.join(texts)}")
    if not differences:
        return ""
    # Checkpoints are named by their run.
    labels = [str(run.about.get("run", run.label)) for run in runs.values()]
    return f"{', '.join(labels)} differ in: {', '.join(differences)}."


def _grouped_by_settings(subjects: Sequence[Subject]) -> list[Subject]:
    """Return the subjects with groups that are labeled by method and by differing options.

    A label is "Bi-LoRA (rho=0.05)", for example, if there is a Bi-LoRA run with another rho.
    """
    settings_by_method: dict[str | None, list[dict[str, Any]]] = {}
    for subject in subjects:
        if subject.record:
            settings_by_method.setdefault(subject.method, []).append(subject.settings())
    grouped = []
    for subject in subjects:
        label = BASE if subject.kind == BASE else subject.group
        if subject.record:
            differing = differing_options(settings_by_method[subject.method])
            distinctions: list[str] = []
            for name, value in subject.settings().items():
                if name in differing:
                    distinctions.append(f"{name}={_as_text(value)}")
            if distinctions:
                label = f"{label} ({', '.join(distinctions)})"
        grouped.append(replace(subject, group=label))
    return grouped


def _as_text(value: Any) -> str:
    """Return an option's value as text; only the last part of a path."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and "/" in value:
        return Path(value).name
    return str(value)


def _check_group(label: str, members: Sequence[Subject]) -> None:
    """Raise UserError if a group has several methods, or two runs with the same seed."""
    methods = sorted({subject.method for subject in members if subject.method})
    if len(methods) > 1:
        raise UserError(
            f'the group "{label}" mixes {" and ".join(methods)}: use one group for each method.'
        )
    seeds: dict[int, Subject] = {}
    for subject in members:
        if subject.seed is None:
            continue
        earlier = seeds.setdefault(subject.seed, subject)
        if earlier is not subject:
            raise UserError(
                f"{earlier.folder} and {subject.folder} are both seed {subject.seed} of"
                f' "{label}": leave one out, or put it into another group by --group LABEL=RUN.'
            )


def _unique(names: Sequence[str]) -> list[str]:
    """Return the names; a repeated name gets a number."""
    unique: list[str] = []
    for name in names:
        unique.append(_make_unique(name, unique, separator="-"))
    return unique


def _make_unique(name: str, used_names: Collection[str], separator: str) -> str:
    """Return the name; if it is already used, with the first free number from 2 on."""
    number = 1
    candidate = name
    while candidate in used_names:
        number += 1
        candidate = f"{name}{separator}{number}"
    return candidate


def _split_label(word: str) -> tuple[str | None, str]:
    """Return the label and the adapter of LABEL=ADAPTER; None and the word if it has no label."""
    label, equals, adapter = word.partition("=")
    # A path may have an equals sign in its name.
    if not equals or "/" in label or Path(word).expanduser().exists():
        return None, word
    label, adapter = " ".join(label.split()), adapter.strip()
    if not label or not adapter:
        raise UserError(f'"{word}" lacks a label or an adapter: write LABEL=ADAPTER.')
    return label, adapter
