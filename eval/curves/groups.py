"""Which run folders are repeats of one another: groups of one setting over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilora_diffusion.config import DreamBoothConfig, TextConfig
from bilora_diffusion.errors import UserError
from bilora_diffusion.methods import get, option_names
from bilora_diffusion.run import runlog

from ..groups import read_groups

STANDS_FOR = {
    "auxiliary_learning_rate": "learning_rate",
    "auxiliary_rank": "rank",
    "auxiliary_alpha": "lora_alpha",
}
"""Options that are another's value where they are not given."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder and its ``run.json``."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def method(self) -> str:
        return self.record["method"]

    @property
    def seed(self) -> int:
        return self.record["seed"]

    @property
    def finished(self) -> bool:
        return self.record["status"] == "finished"

    def option(self, name: str) -> Any:
        """An option of the run; None where the record does not have it."""
        config = self.record["config"]
        value = config.get(name)
        return config.get(STANDS_FOR[name]) if value is None and name in STANDS_FOR else value

    @property
    def is_text(self) -> bool:
        """Whether train_text_bilora.py made it."""
        return "model_name_or_path" in self.record["config"]

    def settings(self) -> dict[str, Any]:
        """The options that made a difference to what was learned, but for the seed."""
        unread = option_names() - get(self.method).reads
        config = self.record["config"]
        script = TextConfig if self.is_text else DreamBoothConfig
        names = set(config) - script.without_influence - unread - {"seed", "method"}
        return {name: self.option(name) for name in sorted(names)}


@dataclass(frozen=True)
class Group:
    """Runs of one setting that differ in the seed.

    Args:
        label: for tables and figures.
        method: of all its runs.
        runs: by seed.
    """

    label: str
    method: str
    runs: dict[int, RunFolder]

    @property
    def first(self) -> RunFolder:
        """The run of the lowest seed."""
        return self.runs[min(self.runs)]


def gather(folders: Sequence[str], groups: Sequence[str]) -> list[Group]:
    """The groups that a command line means.

    Args:
        folders: run folders; those of one method and setting form a group, labelled by the method's
            title and whatever tells it from the others of that method.
        groups: "LABEL=RUN,RUN" each, for runs that are to stand together under a name.

    Raises:
        UserError: no run, a folder that is none or comes twice, a malformed group, one that mixes
            methods, or two runs of one seed in a group.
    """
    named = read_groups(groups)
    if not folders and not named:
        raise UserError("no runs are given: name run folders, or use --group LABEL=RUN,RUN.")
    seen: dict[Path, str] = {}
    for word in [*folders, *(word for _, words in named for word in words)]:
        place = Path(word).resolve()
        if place in seen:
            raise UserError(f"{word} is given twice: keep one.")
        seen[place] = word
    found = _by_setting([_open(word) for word in folders])
    found += [_group(label, [_open(word) for word in words]) for label, words in named]
    labels = [group.label for group in found]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f'two groups are called "{label}": give one another name by --group.')
    return found


def _open(word: str) -> RunFolder:
    record = runlog.read_run(Path(word))
    get(record["method"])
    return RunFolder(Path(word), record)


def _by_setting(runs: Sequence[RunFolder]) -> list[Group]:
    found: dict[tuple[str, str], list[RunFolder]] = {}
    for run in runs:
        told = _distinction(run, [other for other in runs if other.method == run.method])
        found.setdefault((run.method, told), []).append(run)
    return [
        _group(get(method).title + (f" ({told})" if told else ""), own)
        for (method, told), own in found.items()
    ]


def _distinction(run: RunFolder, others: Sequence[RunFolder]) -> str:
    """The options in which runs of one method differ, with this run's values."""
    own, settings = run.settings(), [other.settings() for other in others]
    differing = [name for name in own if any(s.get(name) != own[name] for s in settings)]
    return ", ".join(f"{name}={_shown(own[name])}" for name in differing)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def _group(label: str, runs: Sequence[RunFolder]) -> Group:
    methods = sorted({run.method for run in runs})
    if len(methods) > 1:
        raise UserError(
            f'the group "{label}" mixes {" and ".join(methods)}: give each method a group.'
        )
    by_seed: dict[int, RunFolder] = {}
    for run in runs:
        if run.seed in by_seed:
            raise UserError(
                f"{by_seed[run.seed].folder} and {run.folder} are both seed {run.seed} of"
                f' "{label}": leave one out, or give it a name of its own by --group LABEL=RUN.'
            )
        by_seed[run.seed] = run
    return Group(label, methods[0], dict(sorted(by_seed.items())))
