"""An experiment: a YAML file that says what is trained and what is compared.

    recipe: recipes/mini.yaml          # or a list of recipes, each compared by itself
    script: train_dreambooth_bilora.py # the default
    options: {max_train_steps: 120}    # of all runs
    variants:                          # label: options
      LoRA: {method: lora}
      Bi-LoRA: {method: bilora}
    axes: {rho: [0.05, 0.5, 1]}        # each variant once per value, where its method reads it
    seeds: 0..4                        # or a list; runs of one seed are paired
    control: LoRA                      # default: the first variant
    metric: heldout_loss               # the default; a key of metrics.jsonl
    higher_is_better: false

A variant with a seed is a run. Every run is checked by the training script's own parser before the
first one is trained.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bilora_diffusion.config.command_line import read_options
from bilora_diffusion.core.errors import UserError, did_you_mean, placed

from ..command import read_integers
from .reporting import HELDOUT

IMAGE_SCRIPT = "train_dreambooth_bilora.py"
SEED = "seed"
# Options of the training script that the sweep sets
SWEEP_OPTIONS = ("config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")


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


Value = Annotated[Any, BeforeValidator(read_value)]
Values = Annotated[dict[str, Value], BeforeValidator(read_options_of)]
Axis = Annotated[list[Value], Field(min_length=1)]


class Experiment(BaseModel):
    """The content of a file, see above."""

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
    metric: str = HELDOUT
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
    with placed(f"{path}: "):
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
    # A misspelt key comes before the one that is missing therefore.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem, keys = problems[0], list(Experiment.model_fields)
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
