"""Runs and adapters of a command line, each with its base model and template."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bilora_diffusion import methods
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import without_paths

from .. import checkpoints, subjects
from ..subjects import BASE, Subject

# Name of the template that adds nothing to the prompt
NO_TEMPLATE = "none"


@dataclass(frozen=True)
class BaseModel:
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


def read_subjects(args: argparse.Namespace, only_heldout: bool) -> list[tuple[Subject, BaseModel]]:
    """The subjects of a command line, each with the model under it; the base model is the last.

    Args:
        only_heldout: only recorded metrics are shown. Then runs of different training sets share a
            row, as in Table 1, and the metrics of the base model are those that the runs of each
            seed measured before their first step.
    """
    if not args.runs and not args.group:
        raise UserError("nothing is given to score: name run folders, adapters, or base.")
    of_checkpoints = args.steps is not None
    words = []
    for word in args.runs:
        # The base model is added below. It has no checkpoints, which `gather` then refuses.
        if word != BASE or of_checkpoints:
            words.append(word)
    runs: list[Subject] = []
    if words or args.group:
        # Weights of checkpoints are exported below.
        runs = subjects.gather(words, args.group, weights=not of_checkpoints)
    for run in runs:
        if run.record and not run.is_text:
            raise UserError(
                f"{run.folder} is a run that makes images: use python -m eval.clip_scores."
            )

    labels = {label for label, _ in subjects.read_groups(args.group)}
    runs = regroup_by_training_set(runs, labels, only_heldout)
    if of_checkpoints:
        runs = checkpoints.of_runs(runs, args.steps)
    pairs = models_under(runs, args)
    if BASE in args.runs:
        base_model = model_of_base(pairs, args)
        pairs += [(base, base_model) for base in base_subjects(runs, only_heldout)]
    return [(with_facts(subject, model), model) for subject, model in pairs]


def regroup_by_training_set(
    runs: Sequence[Subject], labels: Collection[str], share_rows: bool
) -> list[Subject]:
    """Group the runs of each training set by themselves, as its settings may be its own.

    Args:
        labels: groups that the command line names; they stay as they are.
        share_rows: equal groups of different training sets are one row.
    """
    # Within a training set, equal settings but for the seed are one group.
    folders_by_set: dict[str, list[str]] = {}
    for run in runs:
        if run.record and run.group not in labels:
            folders_by_set.setdefault(training_set(run), []).append(str(run.folder))

    # Groups of different training sets are told apart by the set's name.
    group_by_folder: dict[Path | None, str] = {}
    for name, folders in folders_by_set.items():
        is_alone = share_rows or len(folders_by_set) == 1
        suffix = "" if is_alone else f", trained on {name}"
        for run in subjects.gather(folders):
            group_by_folder[run.folder] = f"{run.group}{suffix}"

    regrouped = []
    for run in runs:
        if run.record and run.folder in group_by_folder:
            run = replace(run, group=group_by_folder[run.folder])
        regrouped.append(run)
    return regrouped


def training_set(run: Subject) -> str:
    """Name of the task or file that a run was trained on."""
    task = run.option("task")
    return str(task or Path(str(run.option("train_file") or "unknown")).stem)


def models_under(
    subjects: Sequence[Subject], args: argparse.Namespace
) -> list[tuple[Subject, BaseModel]]:
    """Each subject with its base model: a run's by its record, an adapter's by its config."""
    model_by_label: dict[str, BaseModel] = {}
    for subject in subjects:
        if subject.record:
            model_by_label[subject.label] = model_of_run(subject.record["config"], args)
    # An adapter without a record is asked under the template of the runs beside it.
    template = "auto"
    if model_by_label:
        template = next(iter(model_by_label.values())).template
    for subject in subjects:
        if not subject.record:
            model_by_label[subject.label] = model_of_adapter(subject, template, args)
    return [(subject, model_by_label[subject.label]) for subject in subjects]


def model_of_run(config: Mapping[str, Any], args: argparse.Namespace) -> BaseModel:
    """The model that a run was trained on."""
    # The options of a text run have the names of these fields.
    options = {}
    for field in fields(BaseModel):
        if field.name != "name" and config.get(field.name) is not None:
            options[field.name] = config[field.name]
    return with_flags(BaseModel(str(config["model_name_or_path"]), **options), args)


def model_of_adapter(subject: Subject, template: str, args: argparse.Namespace) -> BaseModel:
    """The model that an adapter's configuration names."""
    if not subject.base_model and args.model_name_or_path is None:
        raise UserError(
            f"the adapter in {subject.weights} names no base model: give it by"
            " --model_name_or_path."
        )
    revision = subject.about.get("revision")
    model = BaseModel(str(subject.base_model), revision=revision, template=template)
    return with_flags(model, args)


def with_flags(model: BaseModel, args: argparse.Namespace) -> BaseModel:
    """The base model, changed by the flags that concern it."""
    # The revision belongs to the model that the run names.
    if args.model_name_or_path is not None:
        model = replace(model, name=args.model_name_or_path, revision=None)
    is_trusted = model.trust_remote_code or args.trust_remote_code
    return replace(model, quantize=args.quantize or model.quantize, trust_remote_code=is_trusted)


def model_of_base(
    pairs: Sequence[tuple[Subject, BaseModel]], args: argparse.Namespace
) -> BaseModel:
    """The one model that the word "base" means beside these subjects."""
    models, models_of_runs = [], []
    for subject, model in pairs:
        models.append(model)
        if subject.record:
            models_of_runs.append(model)
    # Only a run's record says whether it was trained on a model in 4 bits.
    kinds = {(model.name, model.quantize) for model in models_of_runs or models}
    if len(kinds) > 1 or len({model.name for model in models}) > 1:
        titles = dict.fromkeys(f"{model.name} ({model.quantize})" for model in models)
        raise UserError(
            f'"base" could be several models ({" and ".join(titles)}): score runs of one of them at'
            " a time."
        )
    if models:
        return (models_of_runs or models)[0]
    if args.model_name_or_path is None:
        raise UserError('"base" alone names no model: give it by --model_name_or_path.')
    return with_flags(BaseModel(args.model_name_or_path), args)


def base_subjects(runs: Sequence[Subject], only_heldout: bool) -> list[Subject]:
    """The base model as a subject.

    Recorded metrics have one subject per training set and seed, as its runs met it: a new head, for
    one, differs by the seed.
    """
    run_by_seed: dict[tuple[str, int | None], Subject] = {}
    for run in runs:
        if only_heldout and run.record:
            run_by_seed.setdefault((training_set(run), run.seed), run)
    has_many_sets = len({name for name, _ in run_by_seed}) > 1

    # Recorded metrics are read from the runs, so these subjects have their folders.
    base = Subject(BASE, BASE, BASE, BASE)
    bases = []
    for (name, seed), run in run_by_seed.items():
        label = f"{BASE}-{name}-seed{seed}" if has_many_sets else f"{BASE}-seed{seed}"
        bases.append(replace(base, label=label, seed=seed, folder=run.folder, record=run.record))
    return bases or [base]


def with_facts(subject: Subject, model: BaseModel) -> Subject:
    """A subject with facts for tables: base model, training set, cost and memory of training."""
    about: dict[str, Any] = subject.about | {"quantize": model.quantize}
    if subject.record:
        about["training_set"] = training_set(subject)
    if subject.method in methods.names():
        about["cost"] = methods.get(str(subject.method)).passes
        about["peak_memory"] = subject.record.get("peak_memory_bytes") or None
    return replace(subject, base_model=without_paths(model.name), about=about)
