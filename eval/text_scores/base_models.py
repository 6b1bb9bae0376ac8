"""The runs and adapters given on the command line, each with its base model and template."""

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
    """A base model with its options for ``load_text_model``, its quantization, and a template."""

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
        """Return the base model's fields that a score depends on, without file paths."""
        return asdict(self) | {"cache_dir": None, "name": without_paths(self.name)}


def read_subjects(args: argparse.Namespace, only_heldout: bool) -> list[tuple[Subject, BaseModel]]:
    """Read the subjects of the command line, each with its base model; the base model comes last.

    Args:
        args: the command's options.
        only_heldout: whether only recorded metrics are shown. Then runs with different training
            sets share a row, as in the paper's Table 1, and the base model's metrics are those that
            the first run of each training set and seed measured before its first step.
    """
    if not args.runs and not args.group:
        raise UserError('there is nothing to score: name run folders, adapters, or "base".')
    of_checkpoints = args.steps is not None
    words = []
    for word in args.runs:
        # The base model is added below. With --steps, `gather` refuses it, since it has no
        # checkpoints.
        if word != BASE or of_checkpoints:
            words.append(word)
    runs: list[Subject] = []
    if words or args.group:
        # The weights of checkpoints are exported below.
        runs = subjects.gather(words, args.group, weights=not of_checkpoints)
    for run in runs:
        if run.record and not run.is_text:
            raise UserError(
                f"{run.folder} is a run of an image model: use python -m eval.clip_scores."
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
    """Group the runs of each training set separately, because sets may have different settings.

    Args:
        runs: the runs and adapters.
        labels: names of the groups given with --group, which do not change.
        share_rows: whether groups of different training sets with the same name share a row.
    """
    # Within a training set, runs that differ only in the seed are one group.
    folders_by_set: dict[str, list[str]] = {}
    for run in runs:
        if run.record and run.group not in labels:
            folders_by_set.setdefault(training_set(run), []).append(str(run.folder))

    # The name of the training set distinguishes the groups of different sets.
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
    """Return the name of the task or file that a run was trained on."""
    task = run.option("task")
    return str(task or Path(str(run.option("train_file") or "unknown")).stem)


def models_under(
    subjects: Sequence[Subject], args: argparse.Namespace
) -> list[tuple[Subject, BaseModel]]:
    """Find each subject's base model, in the run's record or in the adapter's configuration."""
    model_by_label: dict[str, BaseModel] = {}
    for subject in subjects:
        if subject.record:
            model_by_label[subject.label] = model_of_run(subject.record["config"], args)
    # An adapter without a record gets the template of the first run.
    template = "auto"
    if model_by_label:
        template = next(iter(model_by_label.values())).template
    for subject in subjects:
        if not subject.record:
            model_by_label[subject.label] = model_of_adapter(subject, template, args)
    return [(subject, model_by_label[subject.label]) for subject in subjects]


def model_of_run(config: Mapping[str, Any], args: argparse.Namespace) -> BaseModel:
    """Return the base model that a run was trained on."""
    # The fields have the same names as the options of a text run.
    options = {}
    for field in fields(BaseModel):
        if field.name != "name" and config.get(field.name) is not None:
            options[field.name] = config[field.name]
    return with_flags(BaseModel(str(config["model_name_or_path"]), **options), args)


def model_of_adapter(subject: Subject, template: str, args: argparse.Namespace) -> BaseModel:
    """Return the base model that an adapter's configuration names."""
    if not subject.base_model and args.model_name_or_path is None:
        raise UserError(
            f"the adapter in {subject.weights} names no base model: give it with"
            " --model_name_or_path."
        )
    revision = subject.about.get("revision")
    model = BaseModel(str(subject.base_model), revision=revision, template=template)
    return with_flags(model, args)


def with_flags(model: BaseModel, args: argparse.Namespace) -> BaseModel:
    """Return the base model with the changes that the flags make to it."""
    # The recorded revision belongs to the recorded model, not to another one.
    if args.model_name_or_path is not None:
        model = replace(model, name=args.model_name_or_path, revision=None)
    is_trusted = model.trust_remote_code or args.trust_remote_code
    return replace(model, quantize=args.quantize or model.quantize, trust_remote_code=is_trusted)


def model_of_base(
    pairs: Sequence[tuple[Subject, BaseModel]], args: argparse.Namespace
) -> BaseModel:
    """Return the model that the word "base" means for these subjects.

    Raises:
        UserError: the subjects have several base models, or there is none.
    """
    models, models_of_runs = [], []
    for subject, model in pairs:
        models.append(model)
        if subject.record:
            models_of_runs.append(model)
    # Only a run's record says whether its base model was quantized.
    kinds = {(model.name, model.quantize) for model in models_of_runs or models}
    if len(kinds) > 1 or len({model.name for model in models}) > 1:
        titles = dict.fromkeys(f"{model.name} ({model.quantize})" for model in models)
        raise UserError(
            f'"base" could be several models ({" and ".join(titles)}): score the runs of one base'
            " model at a time."
        )
    if models:
        return (models_of_runs or models)[0]
    if args.model_name_or_path is None:
        raise UserError('"base" alone names no model: give one with --model_name_or_path.')
    return with_flags(BaseModel(args.model_name_or_path), args)


def base_subjects(runs: Sequence[Subject], only_heldout: bool) -> list[Subject]:
    """Return the base model as one or more subjects.

    For recorded metrics, there is one subject per training set and seed, because the model before
    training can depend on both: for example, the initial values of a new head depend on
    the seed.
    """
    run_by_seed: dict[tuple[str, int | None], Subject] = {}
    for run in runs:
        if only_heldout and run.record:
            run_by_seed.setdefault((training_set(run), run.seed), run)
    has_many_sets = len({name for name, _ in run_by_seed}) > 1

    # Recorded metrics are read from the runs, so these subjects have the runs' folders.
    base = Subject(BASE, BASE, BASE, BASE)
    bases = []
    for (name, seed), run in run_by_seed.items():
        label = f"{BASE}-{name}-seed{seed}" if has_many_sets else f"{BASE}-seed{seed}"
        bases.append(replace(base, label=label, seed=seed, folder=run.folder, record=run.record))
    return bases or [base]


def with_facts(subject: Subject, model: BaseModel) -> Subject:
    """Add the facts shown in tables: base model, training set, cost and memory of training."""
    about: dict[str, Any] = subject.about | {"quantize": model.quantize}
    if subject.record:
        about["training_set"] = training_set(subject)
    if subject.method in methods.names():
        about["cost"] = methods.get(str(subject.method)).passes
        about["peak_memory"] = subject.record.get("peak_memory_bytes") or None
    return replace(subject, base_model=without_paths(model.name), about=about)
