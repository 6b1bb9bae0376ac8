"""An experiment, read from a YAML file (see `eval.sweep`), and its runs: variants times seeds.

Every run is checked by the training script's own parser before the first one is trained.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
import reprlib
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bilora_diffusion import methods
from bilora_diffusion.config import resolving
from bilora_diffusion.config import run as run_config
from bilora_diffusion.config.command_line import read_options
from bilora_diffusion.core.errors import UserError, add_source, did_you_mean
from bilora_diffusion.core.fields import default_of
from bilora_diffusion.core.files import ROOT, without_paths
from bilora_diffusion.core.values import HELDOUT_LOSS
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.run.settings import without_options
from bilora_diffusion.text.config import TextConfig

from .command import read_integers

IMAGE_SCRIPT = "train_dreambooth_bilora.py"
SEED = "seed"
# Options of the training script that the sweep sets
SWEEP_OPTIONS = ("config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")
# Training script -> class of its configuration
CONFIGS = {IMAGE_SCRIPT: DreamBoothConfig, "train_text_bilora.py": TextConfig}
# Options without influence on the training, by which figures are recorded that runs compare
MEASURING_OPTIONS = (*sorted(run_config.HELDOUT_OPTIONS), "validation_loss_steps")
# Imports a script once, since a method can be registered once.
import_script = functools.cache(runpy.run_path)


def read_value(value: Any) -> bool | str:
    """A single value of an option."""
    if not isinstance(value, bool | str):
        raise ValueError("a single value")
    return value


def read_options_of(mapping: Any) -> Any:
    """Options by their names in Python; those that the sweep sets are refused."""
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        return mapping
    options = {}
    for name, value in mapping.items():
        option = str(name).replace("-", "_")
        if option == SEED:
            raise UserError("an option sets the seed: give seeds instead.")
        if option in SWEEP_OPTIONS:
            raise UserError(f"an option sets {option}, which the sweep does: leave it out.")
        options[option] = value
    return options


def read_seeds(value: Any) -> tuple[int, ...]:
    """The seeds of ``0..4`` (4 included), of ``0,1,5``, or of a list."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return tuple(read_integers(text, f'"{text}" is no list of seeds'))


def require_different(values: list[Any]) -> list[Any]:
    """Refuse a list with a value twice."""
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{value} stands twice in a list: keep one.")
    return values


# Types of the file's values, which are checked while they are read
Value = Annotated[Any, BeforeValidator(read_value)]
Values = Annotated[dict[str, Value], BeforeValidator(read_options_of)]
Axis = Annotated[list[Value], Field(min_length=1)]


class Experiment(BaseModel):
    """The content of a file; `eval.sweep` explains its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # YAML file of options that all runs share, or several of them
    recipe: str | list[str]
    script: str = IMAGE_SCRIPT
    # Further options of all runs; those of a variant win
    options: Values = {}
    # Label -> options
    variants: dict[str, Values] = {}
    # Option -> its values
    axes: Annotated[dict[str, Axis], BeforeValidator(read_options_of)] = {}
    # None for the recipe's seed
    seeds: Annotated[tuple[int, ...] | None, BeforeValidator(read_seeds)] = None
    # Label of the variant that the others are compared with; None for the first
    control: str | None = None
    # Key of ``metrics.jsonl``
    metric: str = HELDOUT_LOSS
    higher_is_better: bool = False


def read_experiment(path: Path, settings: Sequence[str] = (), **overrides: Any) -> Experiment:
    """The experiment of a file.

    Args:
        path: the file.
        settings: the ``NAME=VALUE`` words of ``--set``, added to the file's options.
        overrides: further keys that the command line gives; None leaves the file's.
    """
    if not path.is_file():
        raise UserError(f'there is no experiment "{path}": correct the name of the file.')
    content = read_options(path, f'the experiment "{path}"', "the command line")
    with add_source(f"{path}: "):
        if not isinstance(content, dict):
            raise UserError("an experiment is a mapping: write lines like recipe: FILE.yaml.")
        # Flags are keys of the file that the command line gives, so they are checked as such.
        content |= {key: value for key, value in overrides.items() if value is not None}
        return parse(content, read_settings(settings))


def parse(content: Mapping[str, Any], options: Mapping[str, str]) -> Experiment:
    """The typed content of a file, with further options of all runs."""
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        raise UserError(describe(error)) from error
    experiment = experiment.model_copy(update={"options": {**experiment.options, **options}})
    # An option has one value in a run.
    for name, values in experiment.axes.items():
        require_different(values)
        in_variants = any(name in options for options in experiment.variants.values())
        if in_variants or name in experiment.options:
            raise UserError(f'"{name}" is an axis and set elsewhere too: keep one.')
    return experiment


def describe(error: ValidationError) -> str:
    """The first problem of a file's content."""
    # A misspelt key is told first: the key that it stands for is missing only therefore.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    keys = list(Experiment.model_fields)
    name = ".".join(str(part) for part in problem["loc"][:3] if part not in ("str", "list[str]"))
    reason = problem.get("ctx", {}).get("error")
    if isinstance(reason, UserError):
        return f"{name}: {reason}"
    if problem["type"] == "extra_forbidden":
        return f'there is no key "{name}"{did_you_mean(name, keys)}: use {", ".join(keys)}.'
    if problem["type"] == "missing":
        return f'it has no "{name}": write it as the experiments in eval/experiments do.'
    value = reprlib.repr(problem["input"])
    return f'"{name}" can\'t be {value}: write it as the experiments in eval/experiments do.'


def read_settings(words: Sequence[str]) -> dict[str, str]:
    """The ``NAME=VALUE`` words of ``--set``."""
    values: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().lstrip("-")
        if not (name and equals and value.strip()):
            raise UserError(f'--set has "{word}": write NAME=VALUE.')
        if name in values:
            raise UserError(f'--set gives "{name}" twice: keep one.')
        values[name] = value
    return read_options_of(values)


@dataclass(frozen=True)
class Variant:
    """One row of the table: a label, and option -> value without those its method ignores."""

    label: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of a plan."""

    # Name of its folder: the variant, the seed, and a hash of the options
    name: str
    variant: str
    # Of data, noise and initialization
    seed: int
    # Flags of the training script, beside the recipe and the run folder
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The runs of an experiment on one recipe."""

    # Folder of the runs: the file's name, and the recipe's name where the file lists several
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
    with add_source(f"{path}: "):
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
    raise UserError(f'there is no recipe "{name}": name a file, such as recipes/mini.yaml.')


def find_script(name: str) -> Path:
    """A training script by its place in the repository, or by its path.

    A script of the user's takes the options of the DreamBooth script. It is imported here, for the
    methods that it registers.
    """
    for path in (ROOT / name, Path(name)):
        if path.is_file():
            if path.name not in CONFIGS:
                import_script(str(path.resolve()))
            return path.resolve()
    scripts = ", ".join(CONFIGS)
    raise UserError(
        f'there is no script "{name}"{did_you_mean(name, CONFIGS)}: use {scripts}, or one of yours.'
    )


def make_plan(experiment: Experiment, name: Path, recipe: Path, script: Path) -> Plan:
    """All variants and runs, each variant checked."""
    with resolving.collect_notes() as notes:
        variants, configs = make_variants(experiment, recipe, script)
    for note in dict.fromkeys(notes):  # one note may be on many variants
        resolving.logger.warning("%s", note)
    seeds = experiment.seeds
    if seeds is None:
        seeds = (int(configs[0].seed),)
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
    with add_source(f'in the variant "{label}": '):
        config = config_class.resolve(
            ["--config", str(recipe), *flags, "--output_dir=run", "--overwrite_output_dir"]
        )
    if experiment.metric == HELDOUT_LOSS and getattr(config, "validation_dataset", "") is None:
        raise UserError(
            f'the variant "{label}" would have no {HELDOUT_LOSS}: give it a validation_dataset, or'
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
    values = without_options(config.to_dict(), config.changeable_options())
    for name in MEASURING_OPTIONS:
        values[name] = config.to_dict().get(name)
    for option in dataclasses.fields(config):
        if option.name in values and values[option.name] == default_of(option):
            del values[option.name]
    if script.name not in CONFIGS:
        values["script"] = script.name
    return values


def folder_name(label: str, seed: int, identity: Mapping[str, Any]) -> str:
    """Name of a run's folder: its variant, its seed, and a hash of its options."""
    # Letters, digits and points of the label, at most 60
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
