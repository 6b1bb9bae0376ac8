"""The runs of an experiment: each variant with each seed.

The training script's own parser checks every run before the first one is trained.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilora_diffusion import methods
from bilora_diffusion.config import resolving
from bilora_diffusion.core.errors import UserError, add_source, did_you_mean
from bilora_diffusion.core.files import ROOT, without_paths
from bilora_diffusion.core.values import HELDOUT_LOSS
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.text.config import TextConfig
from bilora_diffusion.train.variants import Variant, folder_name, identity_of, to_flags

from .experiment import HELDOUT, IMAGE_SCRIPT, SEED, Experiment, Scores, read_experiment

# Training script -> class of its configuration
CONFIGS = {IMAGE_SCRIPT: DreamBoothConfig, "train_text_bilora.py": TextConfig}
# Separator of the labels in ``--variants``; a label may contain commas
SEPARATOR = ";"
# Imports a script only once, because a method can't be registered twice
import_script = functools.cache(runpy.run_path)


@dataclass(frozen=True)
class Run:
    """One run of a plan."""

    # Name of the run's folder: the variant, the seed, and a hash of the options
    name: str
    variant: str
    # Seed of data, noise and initialization
    seed: int
    # Flags of the training script, without the recipe and the run folder
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The runs of an experiment on one recipe."""

    # Folder of the runs, relative to ``--runs_dir``: the name of the experiment's file and, if the
    # file has a list of recipes, the name of the recipe
    name: Path
    experiment: Experiment
    recipe: Path
    script: Path
    # Labels of all variants of the experiment, in the order of the report
    labels: Sequence[str]
    # Variants that are trained
    variants: Sequence[Variant]
    seeds: Sequence[int]
    # Sorted by seed, so that pairs of runs are finished early
    runs: Sequence[Run]
    # Label of the variant that the others are compared with
    control: str
    # Base model of the runs
    base_model: str


def load(
    path: Path,
    settings: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
    scores_keys: Mapping[str, Any] | None = None,
    variants: str | None = None,
) -> list[Plan]:
    """Return the plans of an experiment's file, one for each of its recipes.

    Args:
        path, settings, keys, scores_keys: see `read_experiment`.
        variants: labels of the variants to train, separated by semicolons; None for all variants.
    """
    experiment = read_experiment(path, settings, keys, scores_keys)
    with add_source(f"{path}: "):
        script = find_script(experiment.script)
        if experiment.scores is not None:
            experiment = with_checkpoints(experiment, experiment.scores, script)
        recipes, names = [experiment.recipe], [Path(path.stem)]
        if not isinstance(experiment.recipe, str):
            recipes = experiment.recipe
            names = [Path(path.stem) / Path(recipe).stem for recipe in recipes]
        plans = []
        for recipe, name in zip(recipes, names, strict=True):
            plan = make_plan(experiment, name, find_recipe(str(recipe)), script)
            plans.append(plan if variants is None else with_variants(plan, variants))
        return plans


def with_checkpoints(experiment: Experiment, scores: Scores, script: Path) -> Experiment:
    """Return the experiment with options that make its runs save the sampled checkpoints.

    The runs end at the last of these, and generate no validation images. Options that the
    experiment sets are not changed.
    """
    if CONFIGS.get(script.name) is TextConfig:
        raise UserError(f"scores are for images, but {script.name} trains on text: omit them.")
    options = {
        "max_train_steps": str(max(scores.steps)),
        # The largest interval that includes all sampled steps
        "checkpointing_steps": str(math.gcd(*scores.steps)),
        # No limit: the checkpoint of an interruption must not replace one that is sampled.
        "checkpoints_total_limit": "0",
        "num_validation_images": "0",
    }
    return experiment.model_copy(update={"options": {**options, **experiment.options}})


def with_variants(plan: Plan, text: str) -> Plan:
    """Return the plan with only the variants of some labels, which semicolons separate."""
    labels = [label.strip() for label in text.split(SEPARATOR)]
    for label in labels:
        if label not in plan.labels:
            raise UserError(
                f'--variants has "{label}"{did_you_mean(label, plan.labels)}: choose from'
                f" {f'{SEPARATOR} '.join(plan.labels)}."
            )
    variants = [variant for variant in plan.variants if variant.label in labels]
    runs = [run for run in plan.runs if run.variant in labels]
    return dataclasses.replace(plan, variants=variants, runs=runs)


def find_recipe(name: str) -> Path:
    """Return the path of a recipe, which is named by its path or relative to the repository."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path
    raise UserError(f'there is no recipe "{name}": name a file, such as recipes/mini.yaml.')


def find_script(name: str) -> Path:
    """Return the path of a training script, which is named relative to the repository or by path.

    A user's own script must accept the options of the DreamBooth script. It is imported here to
    register its methods.
    """
    for path in (ROOT / name, Path(name)):
        if path.is_file():
            if path.name not in CONFIGS:
                import_script(str(path.resolve()))
            return path.resolve()
    scripts = ", ".join(CONFIGS)
    raise UserError(
        f'there is no script "{name}"{did_you_mean(name, CONFIGS)}: use {scripts}, or your own.'
    )


def make_plan(experiment: Experiment, name: Path, recipe: Path, script: Path) -> Plan:
    """Check all variants of an experiment, and return the plan of its runs."""
    with resolving.collect_notes() as notes:
        variants, configs = make_variants(experiment, recipe, script)
    for note in dict.fromkeys(notes):  # several variants may cause the same note
        resolving.logger.warning("%s", note)
    seeds = experiment.seeds
    if seeds is None:
        seeds = (int(configs[0].seed),)
    runs: list[Run] = []
    for seed in seeds:
        for variant, config in zip(variants, configs, strict=True):
            flags = to_flags({**experiment.options, **variant.options, SEED: seed})
            identity = {**identity_of(config), SEED: seed}
            if script.name not in CONFIGS:
                identity["script"] = script.name
            folder = folder_name(variant.label, seed, identity)
            runs.append(Run(folder, variant.label, seed, flags))
    labels = [variant.label for variant in variants]
    if experiment.scores is not None:
        scores = check_scores(experiment.scores, labels, configs)
        experiment = experiment.model_copy(update={"scores": scores})
    return Plan(
        name,
        experiment,
        recipe,
        script,
        labels,
        variants,
        seeds,
        runs,
        control=choose_control(experiment.control, labels),
        base_model=configs[0].base_model,
    )


def check_scores(scores: Scores, labels: Sequence[str], configs: Sequence[Any]) -> Scores:
    """Check that each run saves the sampled checkpoints.

    Returns:
        The scores, with the runs' held-out set as the prompts if ``prompts`` is "heldout".
    """
    for label, config in zip(labels, configs, strict=True):
        last_step = config.max_train_steps
        interval = config.checkpointing_steps
        for step in scores.steps:
            is_saved = interval and step % interval == 0
            if not is_saved or (last_step is not None and step > last_step):
                raise UserError(
                    f'scores.steps has {step}, at which the variant "{label}" has no checkpoint:'
                    " leave max_train_steps and checkpointing_steps out of the options."
                )
    if scores.prompts != HELDOUT:
        return scores
    heldout = configs[0].validation_dataset
    if heldout is None:
        raise UserError(
            f"scores.prompts is {HELDOUT}, but the runs have no held-out images: give them a"
            " validation_dataset, or name a set of prompts."
        )
    return scores.model_copy(update={"prompts": heldout})


def make_variants(
    experiment: Experiment, recipe: Path, script: Path
) -> tuple[list[Variant], list[Any]]:
    """Return each named variant with each point of the axes, and the configuration of each.

    Points that differ only on axes that the variant's method does not read are one variant.
    """
    variants: dict[str, Variant] = {}
    configs: list[Any] = []
    # Without named variants, only the axes define the variants.
    named_variants = experiment.variants or {"": {}}
    points = list(itertools.product(*experiment.axes.values()))
    for (name, options), point in itertools.product(named_variants.items(), points):
        axis_values = dict(zip(experiment.axes, point, strict=True))
        values = {**options, **axis_values}
        flags = to_flags({**experiment.options, **values})
        config = resolve(name or recipe.stem, experiment, recipe, script, flags)
        # For example, LoRA does not read rho, so it is only one variant for all values of rho.
        ignored = methods.option_names() - methods.reads(config.method)
        label = label_of(name, axis_values, ignored) or recipe.stem
        if label not in variants:
            values = {key: values[key] for key in values if key not in ignored}
            variants[label] = Variant(label, values)
            configs.append(config)
    return list(variants.values()), configs


def resolve(
    label: str, experiment: Experiment, recipe: Path, script: Path, flags: Sequence[str]
) -> Any:
    """Return the configuration of a variant, as the training script will resolve it."""
    config_class = CONFIGS.get(script.name, DreamBoothConfig)
    with add_source(f'in the variant "{label}": '):
        config = config_class.resolve(
            ["--config", str(recipe), *flags, "--output_dir=run", "--overwrite_output_dir"]
        )
    # Samples need no held-out loss.
    is_required = experiment.metric == HELDOUT_LOSS and experiment.scores is None
    if is_required and getattr(config, "validation_dataset", "") is None:
        raise UserError(
            f'the variant "{label}" would have no {HELDOUT_LOSS}: give it a validation_dataset, or'
            " choose another metric."
        )
    return config


def label_of(name: str, axis_values: Mapping[str, Any], ignored: frozenset[str]) -> str:
    """Return a variant's label: its name, and its values on the axes that its method reads."""
    parts = [name] if name else []
    for option, value in axis_values.items():
        if option not in ignored:
            (flag,) = to_flags({option: value})
            parts.append(without_paths(flag.removeprefix("--")))
    return ", ".join(parts)


def choose_control(label: str | None, labels: Sequence[str]) -> str:
    """Return the label of the control; for None, the label of the first variant."""
    if label is None:
        return labels[0]
    if label not in labels:
        quoted = ", ".join(f'"{known_label}"' for known_label in labels)
        raise UserError(
            f'the control "{label}" is not a variant{did_you_mean(label, labels)}: use one'
            f" of {quoted}."
        )
    return label
