"""What is scored: run folders, PEFT adapters, the base model; which of them are repeats."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bilora_diffusion import methods
from bilora_diffusion.errors import UserError
from bilora_diffusion.run import runlog
from bilora_diffusion.seeds import digest_texts

from ..curves import groups
from ..provenance import without_paths
from .costs import gradient_steps
from .schema import RunEntry

BASE, RUN, PEFT = "base", "run", "adapter"
ADAPTER, ADAPTER_CONFIG, WHOLE_MODEL = "adapter_model.safetensors", "adapter_config.json", "model"
SCORER_OF_IMAGES = "python -m eval.clip_scores"


@dataclass(frozen=True)
class Base:
    """A base model as ``load_text_model`` takes it, and whether in 4 bits."""

    name: str
    task_type: str = "auto"
    revision: str | None = None
    cache_dir: str | None = None
    tokenizer_name: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantize: str = "none"

    def identity(self) -> dict[str, Any]:
        """What a score depends on; where files lie is not."""
        found = asdict(self)
        del found["cache_dir"]
        return found | {"name": without_paths(self.name)}


@dataclass(frozen=True)
class Subject:
    """One thing to score.

    Args:
        name: unique; also names files.
        group: the row of the table that it belongs to.
        kind: "base", "run" or "adapter".
        source: the argument, without machine paths.
        folder: of the adapter or the run; None for the base model, or that of a run which
            recorded what the base model gave before the first step.
        base: the model under it.
        template: that it was trained with.
        digest: of the weights, 32 hexadecimal digits; "" for the base model.
        record: ``run.json``, empty for what is no run.
        task_type: "classification" where the run says so, else what the run says.
    """

    name: str
    group: str
    kind: str
    source: str
    folder: Path | None
    base: Base
    template: str
    digest: str
    record: Mapping[str, Any]

    @property
    def task_type(self) -> str:
        return str(self.record.get("config", {}).get("task_type", "auto"))

    def entry(self) -> RunEntry:
        """For the result."""
        method = self.record.get("method")
        known = method in methods.names()
        return RunEntry(
            name=self.name,
            group=self.group,
            kind=self.kind,
            source=self.source,
            method=method,
            cost=gradient_steps(str(method)) if known else None,
            seed=self.record.get("seed"),
            training_set=training_set(self.record) if self.record else None,
            digest=self.digest,
            base_model=without_paths(self.base.name),
            quantize=self.base.quantize,
            peak_memory=self.record.get("peak_memory_bytes") or None,
        )


def gather(args: argparse.Namespace, only_heldout: bool) -> list[Subject]:
    """The subjects of a command line, in its order: runs in groups, adapters, the base model.

    Args:
        args: runs, group, model_name_or_path, quantize, task_type, tokenizer_name, revision.
        only_heldout: runs of different training sets then share a row, as they do in Table 1, and
            the base model is what the runs of each seed measured before their first step.

    Raises:
        UserError: nothing to score, a folder that is neither, or no word on the base model.
    """
    words = list(args.runs)
    runs = [word for word in words if word != BASE and _is_run(Path(word))]
    others = [word for word in words if word != BASE and word not in runs]
    if not words and not args.group:
        raise UserError("nothing is given to score: name run folders, adapters, or base.")
    found = [_of_run(run, label, args) for label, run in _grouped(runs, args.group, only_heldout)]
    first = found[0] if found else None
    found += [_of_adapter(Path(word), first, args) for word in others]
    if BASE in words:
        bare = _bare(found, args)
        found += _before_training(bare, found) if only_heldout else [bare]
    return _named(found)


def training_set(record: Mapping[str, Any]) -> str:
    """What a run was trained on: a task's name, or a file's."""
    config = record.get("config", {})
    return str(config.get("task") or Path(str(config.get("train_file") or "unknown")).stem)


def _is_run(folder: Path) -> bool:
    return (folder / runlog.RUN).is_file()


def _grouped(
    runs: Sequence[str], named: Sequence[str], only_heldout: bool
) -> list[tuple[str, groups.RunFolder]]:
    """(row, run); each training set is grouped apart, as its settings may be its own."""
    if not runs and not named:
        return []
    whole = groups.gather(runs, named)
    explicit = {word.partition("=")[0].strip() for word in named}
    found: list[tuple[str, groups.RunFolder]] = []
    for group in whole:
        if group.label in explicit:
            found += [(group.label, run) for run in group.runs.values()]
    folders = {Path(word) for word in runs}
    sets: dict[str, list[str]] = {}
    for word in runs:
        sets.setdefault(training_set(runlog.read_run(Path(word))), []).append(word)
    for name, words in sets.items():
        suffix = "" if only_heldout or len(sets) == 1 else f", trained on {name}"
        for group in groups.gather(words, []):
            found += [
                (f"{group.label}{suffix}", run)
                for run in group.runs.values()
                if run.folder in folders
            ]
    return found


def _of_run(run: groups.RunFolder, label: str, args: argparse.Namespace) -> Subject:
    config, folder = run.record["config"], run.folder
    if not run.is_text:
        raise UserError(
            f"{folder} is a run that makes images: score it by {SCORER_OF_IMAGES} {folder}."
        )
    has_adapter = (folder / ADAPTER).is_file() and (folder / ADAPTER_CONFIG).is_file()
    if not has_adapter and not (folder / WHOLE_MODEL).is_dir():
        raise UserError(
            f"{folder} holds neither {ADAPTER} with {ADAPTER_CONFIG} nor {WHOLE_MODEL}/: let the"
            " run finish, or give another."
        )
    return Subject(
        name=folder.resolve().name,
        group=label,
        kind=RUN,
        source=without_paths(str(folder)),
        folder=folder,
        base=_told(_base_of(config), args),
        template=str(config.get("template") or "auto"),
        digest=_digest(folder),
        record=run.record,
    )


def _base_of(config: Mapping[str, Any]) -> Base:
    return Base(
        name=str(config["model_name_or_path"]),
        task_type=str(config.get("task_type") or "auto"),
        revision=config.get("revision"),
        cache_dir=config.get("cache_dir"),
        tokenizer_name=config.get("tokenizer_name"),
        attn_implementation=config.get("attn_implementation"),
        trust_remote_code=bool(config.get("trust_remote_code")),
        quantize=str(config.get("quantize") or "none"),
    )


def _told(base: Base, args: argparse.Namespace) -> Base:
    """The base model, but for what the command line says otherwise."""
    names = ("revision", "cache_dir", "tokenizer_name", "quantize")
    said = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.model_name_or_path is not None:
        said = {"revision": None, "name": args.model_name_or_path, **said}
    if args.trust_remote_code:
        said["trust_remote_code"] = True
    return replace(base, **said)


def _of_adapter(folder: Path, first: Subject | None, args: argparse.Namespace) -> Subject:
    if not folder.is_dir():
        raise UserError(f'"{folder}" is no folder: name run folders, PEFT adapters, or base.')
    missing = [name for name in (ADAPTER, ADAPTER_CONFIG) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is neither a run folder (it has no {runlog.RUN}) nor a PEFT adapter (it has"
            f" no {missing[0]}): give another."
        )
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        name = config.get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG} is damaged: write it again.") from error
    if not name and args.model_name_or_path is None:
        raise UserError(
            f"{folder / ADAPTER_CONFIG} names no base model: give it by --model_name_or_path."
        )
    return Subject(
        name=folder.resolve().name,
        group=folder.resolve().name,
        kind=PEFT,
        source=without_paths(str(folder)),
        folder=folder,
        base=_told(Base(str(name), revision=config.get("revision")), args),
        template=first.template if first else "auto",
        digest=_digest(folder),
        record={},
    )


def _bare(found: Sequence[Subject], args: argparse.Namespace) -> Subject:
    # only runs say whether they were trained on a model in 4 bits
    runs = [subject for subject in found if subject.kind == RUN] or found
    models = {(s.base.name, s.base.quantize) for s in runs}
    if len(models) > 1 or len({subject.base.name for subject in found}) > 1:
        names = " and ".join(dict.fromkeys(f"{s.base.name} ({s.base.quantize})" for s in found))
        raise UserError(
            f'"base" could be several models ({names}): score runs of one of them at a time.'
        )
    if not found and args.model_name_or_path is None:
        raise UserError('"base" alone names no model: give it by --model_name_or_path.')
    base = found[0].base if found else _told(Base(args.model_name_or_path), args)
    template = found[0].template if found else "auto"
    return Subject(BASE, BASE, BASE, BASE, None, base, template, "", {})


def _before_training(bare: Subject, found: Sequence[Subject]) -> list[Subject]:
    """The base model once per training set and seed: a new head, for one, differs by the seed."""
    runs: dict[tuple[str, int], Subject] = {}
    for subject in found:
        if subject.kind == RUN:
            runs.setdefault((training_set(subject.record), subject.record["seed"]), subject)
    return [
        replace(
            bare,
            name=f"{BASE}-seed{seed}",
            folder=run.folder,
            record={"seed": seed, "config": run.record["config"]},
        )
        for (_, seed), run in runs.items()
    ] or [bare]


def _named(found: Sequence[Subject]) -> list[Subject]:
    """Each with a name of its own: that of its folder, with a number where two are alike."""
    taken: set[str] = set()
    unique = []
    for subject in found:
        number, name = 1, subject.name
        while name in taken:
            number += 1
            name = f"{subject.name}-{number}"
        taken.add(name)
        unique.append(replace(subject, name=name))
    return unique


def _digest(folder: Path) -> str:
    """Of the weights; a whole model's are all of its safetensors files."""
    single = folder / ADAPTER
    files = [single] if single.is_file() else sorted((folder / WHOLE_MODEL).glob("*.safetensors"))
    hashes = []
    for path in files:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digest_texts(hashes)
