"""What is looked at: run folders and the base model, in groups, and whether they compare."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bilora_diffusion import methods
from bilora_diffusion.config import DreamBoothConfig
from bilora_diffusion.errors import UserError
from bilora_diffusion.export import FILE_NAME, inspect
from bilora_diffusion.image.pipeline import resolve
from bilora_diffusion.run import runlog

from ..groups import read_groups

BASE = "base"
LOSS_OPTIONS = (
    "resolution",
    "instance_prompt",
    "image_interpolation_mode",
    "do_edm_style_training",
    "snr_gamma",
    "train_text_encoder",
)
"""Options beside base model and images that decide what the loss is a function of."""


@dataclass(frozen=True)
class Subject:
    """One point of the landscape.

    Args:
        label: unique, "GROUP seed N".
        group: what it is averaged in; the method's title by default.
        kind: "adapter" (base and primary), "whole" (full fine-tuning) or "base".
        folder: of the run; of the base model, of the run that its configuration is taken from.
        method, seed: of the run; None for the base model.
        digest: of the weights.
        config: of the run.
        record: the run's ``run.json``.
    """

    label: str
    group: str
    kind: str
    folder: Path
    method: str | None
    seed: int | None
    digest: str
    config: DreamBoothConfig
    record: dict[str, Any]

    @property
    def has_factors(self) -> bool:
        """Whether it has a LoRA space."""
        return self.kind == "adapter"


def read(arguments: Sequence[str], groups: Sequence[str]) -> list[Subject]:
    """The runs of a command line, group by group in the order in which groups are first named.

    Args:
        arguments: run folders, or "base"; grouped by the titles of their methods.
        groups: "LABEL=RUN,RUN,...".

    Raises:
        UserError: no run, a folder without export, a group with two runs of one seed.
    """
    named: list[tuple[str | None, str]] = [(None, word) for word in arguments]
    named += [(label, word) for label, words in read_groups(groups) for word in words]
    runs = [_run(Path(word), label) for label, word in named if word != BASE]
    if not runs:
        what = "the base model alone has no training images" if named else "no run was given"
        raise UserError(f"{what}: name the folder of a run.")
    bases = [_base(runs[0], label) for label, word in named if word == BASE][:1]
    found = bases + runs
    order = list(dict.fromkeys(subject.group for subject in found if subject.kind != BASE))
    found.sort(key=lambda s: order.index(s.group) if s.group in order else len(order))
    _check_groups(found, {label for label, _ in named if label})
    return found


def _run(folder: Path, group: str | None) -> Subject:
    if not folder.exists():
        raise UserError(f"there is no folder {folder}: correct the path of the run.")
    record = runlog.read_run(folder)
    config = _config(folder, record)
    method = methods.get(config.method)
    if method.exports_weights:
        files = [f for n in runlog.WHOLE_MODELS for f in sorted((folder / n).glob("*.safetensors"))]
        kind = "whole"
    else:
        files = [file for file in (folder / FILE_NAME,) if file.is_file()]
        kind = "adapter"
    if not files:
        raise UserError(
            f"{folder} holds no exported weights (its run is {record.get('status')}): finish the"
            " run, or give another."
        )
    if kind == "adapter" and (inside := inspect(files[0])).auxiliary:
        raise UserError(
            f"{files[0]} holds more than the primary ({inside.evidence[0]}): export it again."
        )
    group, seed = group or method.title, record.get("seed")
    return Subject(
        label=f"{group} seed {seed}",
        group=group,
        kind=kind,
        folder=folder,
        method=method.name,
        seed=seed,
        digest=_digest(files),
        config=config,
        record=record,
    )


def _base(run: Subject, group: str | None) -> Subject:
    group = group or BASE
    return replace(
        run, label=group, group=group, kind=BASE, method=None, seed=None, digest="", record={}
    )


def _config(folder: Path, record: dict[str, Any]) -> DreamBoothConfig:
    values = record.get("config")
    known = {field.name for field in fields(DreamBoothConfig)}
    if not isinstance(values, dict) or "pretrained_model_name_or_path" not in values:
        raise UserError(f"{folder} is no run of SDXL DreamBooth: give one of such a run.")
    if unknown := sorted(values.keys() - known):
        raise UserError(
            f"{folder} was trained with the option {unknown[0]}, which this version does not know:"
            " read it with the version that trained it."
        )
    return DreamBoothConfig(**values)


def _digest(files: Sequence[Path]) -> str:
    state = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            state.update(hashlib.file_digest(content, "sha256").digest())
    return state.hexdigest()


def _check_groups(found: Sequence[Subject], explicit: set[str]) -> None:
    """Refuse groups that mix what is no repetition; of the methods' own, also other options."""
    seen: dict[tuple[str, int | None], Subject] = {}
    first: dict[str, Subject] = {}
    for subject in found:
        other = seen.setdefault((subject.group, subject.seed), subject)
        if other is not subject:
            raise UserError(
                f"{other.folder} and {subject.folder} are both {subject.label}: give one of them,"
                " or tell them apart by --group LABEL=RUN,RUN."
            )
        start = first.setdefault(subject.group, subject)
        if subject.group in explicit or subject.kind == BASE:
            continue
        here, there = (s.config.fingerprint() | {"seed": None} for s in (subject, start))
        if differing := [key for key in here if here[key] != there[key]]:
            key = differing[0]
            raise UserError(
                f"{start.folder} and {subject.folder} are {subject.group} with different {key}"
                f" ({there[key]!r} and {here[key]!r}): tell them apart by --group LABEL=RUN,RUN."
            )


def base_key(config: DreamBoothConfig) -> tuple[Any, ...]:
    """What identifies the base model: its name and revision, and the files of a local folder."""
    name = resolve(config.pretrained_model_name_or_path)
    vae = config.pretrained_vae_model_name_or_path
    return name, config.revision, config.variant, vae, *_files(Path(name))


def _files(folder: Path) -> list[tuple[str, int, int]]:
    files = sorted(folder.glob("**/*.safetensors")) if folder.is_dir() else []
    return [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def check_comparable(subjects: Sequence[Subject], sets: Sequence[str]) -> None:
    """Refuse runs whose losses are not the same function of the weights.

    Args:
        subjects: at least one.
        sets: fingerprint of the images of each.

    Raises:
        UserError: another base model, other images or another loss than the first's.
    """
    first = subjects[0]
    for subject, images in zip(subjects, sets, strict=True):
        own, wanted = subject.config, first.config
        if base_key(own) != base_key(wanted):
            what = (
                f"the base model {own.pretrained_model_name_or_path} and not"
                f" {wanted.pretrained_model_name_or_path}"
            )
        elif images != sets[0]:
            what = "other images"
        elif options := [n for n in LOSS_OPTIONS if getattr(own, n) != getattr(wanted, n)]:
            name = options[0]
            what = f"{name} {getattr(own, name)!r} and not {getattr(wanted, name)!r}"
        else:
            continue
        raise UserError(
            f"{subject.folder} has {what}, unlike {first.folder}, so that their losses can't be"
            " compared: look at them in separate calls."
        )
