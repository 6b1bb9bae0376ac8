"""Subjects of text scores: runs that share a row, and the base model and template under each."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bilora_diffusion import methods
from bilora_diffusion.core.errors import UserError

from .. import checkpoints, subjects
from ..provenance import without_paths
from ..subjects import BASE, Subject


@dataclass(frozen=True)
class Base:
    """A base model as ``load_text_model`` takes it, whether in 4 bits, and the template over it."""

    name: str
    task_type: str = "auto"
    revision: str | None = None
    cache_dir: str | None = None
    tokenizer_name: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantize: str = "none"
    template: str = "auto"

    def identity(self) -> dict[str, Any]:
        """All that a score depends on, without the places of files."""
        return asdict(self) | {"cache_dir": None, "name": without_paths(self.name)}


def gather(args: argparse.Namespace, only_heldout: bool) -> list[tuple[Subject, Base]]:
    """The subjects of a command line with what is under them; the base model is the last.

    Args:
        only_heldout: runs of different training sets then share a row, as they do in Table 1, and
            the base model is what the runs of each seed measured before their first step.
    """
    whole = args.steps is None
    words = [word for word in args.runs if word != BASE or not whole]
    if not args.runs and not args.group:
        raise UserError("nothing is given to score: name run folders, adapters, or base.")
    given = subjects.gather(words, args.group, weights=whole) if words or args.group else []
    if images := [run.folder for run in given if run.record and not run.is_text]:
        raise UserError(f"{images[0]} is a run that makes images: use python -m eval.clip_scores.")
    given = _in_rows(given, {label for label, _ in subjects.read_groups(args.group)}, only_heldout)
    given = given if whole else checkpoints.of_runs(given, args.steps)
    runs = {s.label: _of_config(s.record["config"], args) for s in given if s.record}
    template = next(iter(runs.values())).template if runs else "auto"
    pairs = [(one, runs.get(one.label) or _of_adapter(one, template, args)) for one in given]
    if BASE in args.runs:
        base = _bare(list(runs.values()), [base for _, base in pairs], args)
        pairs += [(one, base) for one in _before_training(given, only_heldout)]
    return [(_described(subject, base), base) for subject, base in pairs]


def _in_rows(given: Sequence[Subject], named: Collection[str], together: bool) -> list[Subject]:
    """Each training set grouped apart, as its settings may be its own."""
    sets: dict[str, list[str]] = {}
    for subject in given:
        if subject.record and subject.group not in named:
            sets.setdefault(training_set(subject), []).append(str(subject.folder))
    rows: dict[Path | None, str] = {}
    for name, folders in sets.items():
        suffix = "" if together or len(sets) == 1 else f", trained on {name}"
        rows |= {run.folder: f"{run.group}{suffix}" for run in subjects.gather(folders)}
    return [replace(s, group=rows.get(s.folder, s.group)) if s.record else s for s in given]


def training_set(subject: Subject) -> str:
    """Name of the task or file that a run was trained on."""
    name = subject.option("task") or Path(str(subject.option("train_file") or "unknown")).stem
    return str(name)


def _of_config(config: Mapping[str, Any], args: argparse.Namespace) -> Base:
    names = [field.name for field in fields(Base) if field.name != "name"]
    given = {name: config[name] for name in names if config.get(name) is not None}
    return _as_given(Base(str(config["model_name_or_path"]), **given), args)


def _as_given(base: Base, args: argparse.Namespace) -> Base:
    """The base model, but for what the command line says otherwise."""
    if args.model_name_or_path is not None:
        base = replace(base, name=args.model_name_or_path, revision=None)
    trusted = base.trust_remote_code or args.trust_remote_code
    return replace(base, quantize=args.quantize or base.quantize, trust_remote_code=trusted)


def _of_adapter(subject: Subject, template: str, args: argparse.Namespace) -> Base:
    if not subject.base_model and args.model_name_or_path is None:
        raise UserError(
            f"the adapter in {subject.weights} names no base model: give it by"
            " --model_name_or_path."
        )
    revision = subject.about.get("revision")
    return _as_given(Base(str(subject.base_model), revision=revision, template=template), args)


def _bare(runs: Sequence[Base], under: Sequence[Base], args: argparse.Namespace) -> Base:
    # only runs say whether they were trained on a model in 4 bits
    models = {(base.name, base.quantize) for base in runs or under}
    if len(models) > 1 or len({base.name for base in under}) > 1:
        names = " and ".join(dict.fromkeys(f"{base.name} ({base.quantize})" for base in under))
        raise UserError(
            f'"base" could be several models ({names}): score runs of one of them at a time.'
        )
    if not under and args.model_name_or_path is None:
        raise UserError('"base" alone names no model: give it by --model_name_or_path.')
    return (*runs, *under)[0] if under else _as_given(Base(args.model_name_or_path), args)


def _before_training(given: Sequence[Subject], only_heldout: bool) -> list[Subject]:
    """The base model; of recorded figures once per training set and seed, as runs met it: a new
    head, for one, differs by the seed.
    """
    runs: dict[tuple[str, int | None], Subject] = {}
    for subject in given:
        if only_heldout and subject.record:
            runs.setdefault((training_set(subject), subject.seed), subject)
    several = len({name for name, _ in runs}) > 1
    bare = Subject(BASE, BASE, BASE, BASE)
    return [
        replace(
            bare,
            label=f"{BASE}-{name}-seed{seed}" if several else f"{BASE}-seed{seed}",
            seed=seed,
            folder=run.folder,
            record=run.record,
        )
        for (name, seed), run in runs.items()
    ] or [bare]


def _described(subject: Subject, base: Base) -> Subject:
    """A subject with facts for tables: base model, training set, cost and memory of training."""
    about: dict[str, Any] = subject.about | {"quantize": base.quantize}
    if subject.record:
        about["training_set"] = training_set(subject)
    if subject.method in methods.names():
        about["cost"] = methods.get(str(subject.method)).passes
        about["peak_memory"] = subject.record.get("peak_memory_bytes") or None
    return replace(subject, base_model=without_paths(base.name), about=about)
