"""The runs of an experiment: variants times seeds, each checked before anything is trained."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import re
import runpy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilora_diffusion import methods
from bilora_diffusion.config import resolving
from bilora_diffusion.config import run as run_config
from bilora_diffusion.core.errors import UserError, did_you_mean, placed
from bilora_diffusion.core.fields import default_of
from bilora_diffusion.core.files import ROOT, without_paths
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.text.config import TextConfig

from .experiment import IMAGE_SCRIPT, SEED, Experiment, read_experiment
from .reporting import HELDOUT

# Training script -> what its command line is read as
CONFIGS = {IMAGE_SCRIPT: DreamBoothConfig, "train_text_bilora.py": TextConfig}
# Options that do not touch what is learned, but decide what there is to compare
MEASURING_OPTIONS = (*sorted(run_config.HELDOUT_OPTIONS), "validation_loss_steps")


@dataclass(frozen=True)
class Variant:
    """One row of the table: a label, and option -> value without those its method ignores."""

    label: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run."""

    # Name of its folder: the variant, the seed, and a hash of the options
    name: str
    # Label of its variant
    variant: str
    # Seed of data, noise and initialization
    seed: int
    # Flags of the training script, beside the recipe and the run folder
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The runs of an experiment on one recipe."""

    # Folder of the runs: the file's name, and the recipe's where the file lists several
    name: Path
    experiment: Experiment
    recipe: Path
    script: Path
    variants: Sequence[Variant]
    seeds: Sequence[int]
    # Seed by seed, so that pairs are finished early
    runs: Sequence[Run]
    # Label of the variant that the others are compared with
    control: str


def load(path: Path, settings: Sequence[str] = (), **overrides: Any) -> list[Plan]:
    """The plans of a file's experiment: one for each of its recipes; see `read_experiment`."""
    experiment = read_experiment(path, settings, **overrides)
    with placed(f"{path}: "):
        script = find_script(experiment.script)
        name = Path(path.stem)
        if isinstance(experiment.recipe, str):
            return [make_plan(experiment, name, find_recipe(experiment.recipe), script)]
        recipes = map(find_recipe, experiment.recipe)
        return [make_plan(experiment, name / recipe.stem, recipe, script) for recipe in recipes]


def find_recipe(name: str) -> Path:
    """A recipe by its path, or by its place in the repository."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path
    raise UserError(f'there is no recipe "{name}": correct recipe.')


def find_script(name: str) -> Path:
    """A training script by its place in the repository, or by its path.

    A script that is not listed in `CONFIGS` must take the options of the DreamBooth script; it is
    imported, so that methods which it registers are known.
    """
    for path in (ROOT / name, Path(name)):
        if path.is_file():
            if path.name not in CONFIGS:
                import_script(path.resolve())
            return path.resolve()
    raise UserError(f'there is no script "{name}"{did_you_mean(name, CONFIGS)}: correct script.')


@functools.cache  # a method can be registered once
def import_script(path: Path) -> None:
    """Run a script for the methods that it registers."""
    runpy.run_path(str(path))


@contextmanager
def each_remark_once() -> Iterator[None]:
    """Within the context, what the training script remarks on many variants is logged once."""
    messages: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        count = len(messages)
        messages.add(record.getMessage())
        return len(messages) > count

    logger = logging.getLogger(resolving.__name__)
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def make_plan(experiment: Experiment, name: Path, recipe: Path, script: Path) -> Plan:
    """All variants and runs, each variant checked."""
    with each_remark_once():
        variants, configs = make_variants(experiment, recipe, script)
    seeds = experiment.seeds
    if seeds is None:
        seeds = (int(configs[0].seed),)
    # Seed by seed, so that the first pairs are complete early.
    runs: list[Run] = []
    for seed in seeds:
        for variant, config in zip(variants, configs, strict=True):
            flags = to_flags({**experiment.options, **variant.values, SEED: seed})
            identity = {**identity_of(config, script), SEED: seed}
            folder = folder_name(variant.label, seed, identity)
            runs.append(Run(folder, variant.label, seed, flags))
    control = choose_control(experiment.control, [variant.label for variant in variants])
    return Plan(name, experiment, recipe, script, variants, seeds, runs, control)


def make_variants(
    experiment: Experiment, recipe: Path, script: Path
) -> tuple[list[Variant], list[Any]]:
    """The named variants times the axes, and the configuration of each."""
    variants: dict[str, Variant] = {}
    configs: list[Any] = []
    # Without named variants the axes alone make them.
    named_variants = experiment.variants or {"": {}}
    points = list(itertools.product(*experiment.axes.values()))
    for (name, options), point in itertools.product(named_variants.items(), points):
        axis_values = dict(zip(experiment.axes, point, strict=True))
        values = {**options, **axis_values}
        flags = to_flags({**experiment.options, **values})
        config = resolve(name or recipe.stem, experiment, recipe, script, flags)
        # LoRA does not read rho: it is one variant, whatever the axis rho says.
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
    """The configuration of a variant, as the script will see it."""
    config_class = CONFIGS.get(script.name, DreamBoothConfig)
    with placed(f'in the variant "{label}": '):
        config = config_class.resolve(
            ["--config", str(recipe), *flags, "--output_dir=run", "--overwrite_output_dir"]
        )
    if experiment.metric == HELDOUT and getattr(config, "validation_dataset", "") is None:
        raise UserError(
            f'the variant "{label}" would have no {HELDOUT}: give it a validation_dataset, or'
            " compare by another metric."
        )
    return config


def label_of(name: str, axis_values: Mapping[str, Any], ignored: frozenset[str]) -> str:
    """Label of a variant: its name, and its place on the axes that its method reads."""
    parts = [name] if name else []
    for option, value in axis_values.items():
        if option not in ignored:
            (flag,) = to_flags({option: value})
            parts.append(without_paths(flag.removeprefix("--")))
    return ", ".join(parts)


def to_flags(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Options as ``--name=value``; booleans are yes and no."""
    flags = []
    for name, value in values.items():
        # A word fits a switch and an option with choices alike.
        if isinstance(value, bool):
            value = "yes" if value else "no"
        flags.append(f"--{name}={value}")
    return tuple(flags)


def identity_of(config: run_config.RunConfig, script: Path) -> dict[str, Any]:
    """Options that decide a run's result and are not at their default.

    The recipe's options are among them, so a finished run is not taken for that of an edited
    recipe; defaults are not, so that a new option of the script renames no run.
    """
    values = config.fingerprint()
    # What is measured decides what there is to compare.
    for name in MEASURING_OPTIONS:
        values[name] = config.to_dict().get(name)
    for option in dataclasses.fields(config):
        if option.name in values and values[option.name] == default_of(option):
            del values[option.name]
    if script.name not in CONFIGS:
        values["script"] = script.name
    return values


def folder_name(label: str, seed: int, identity: Mapping[str, Any]) -> str:
    """Name of a run's folder, which tells what is run."""
    # Letters, digits and points, at most 60 of them
    slug = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")[:60] or "variant"
    text = json.dumps(identity, sort_keys=True, default=str)
    return f"{slug}-seed{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def choose_control(label: str | None, labels: Sequence[str]) -> str:
    """The control of an experiment: the variant with this label, by default the first."""
    if label is None:
        return labels[0]
    if label not in labels:
        quoted = ", ".join(f'"{known_label}"' for known_label in labels)
        raise UserError(
            f'the control "{label}" is none of the variants{did_you_mean(label, labels)}: use one'
            f" of {quoted}."
        )
    return label
