"""The content of an experiment's file; ``python -m eval.sweep --help`` explains its keys."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bilora_diffusion.config.command_line import read_options
from bilora_diffusion.core.errors import UserError, add_source, did_you_mean
from bilora_diffusion.core.values import (
    ADAPTER_GUIDANCE,
    BASE_GUIDANCE,
    HELDOUT_LOSS,
    read_guidance_source,
)

from ..clip_scores.settings import SamplingOptions
from ..command import read_integers

IMAGE_SCRIPT = "train_dreambooth_bilora.py"
SEED = "seed"
# Options of the training script that the sweep sets
SWEEP_OPTIONS = ("config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")
# Value of ``scores.prompts`` for the captions of the held-out images
HELDOUT = "heldout"
# Options of eval.clip_scores that an experiment can't set; most are set by other keys of ``scores``
SCORES_OPTIONS = (
    "prompts",
    "max_prompts",
    "seeds",
    "steps",
    "guidance_from",
    "guidance_scale",
    "output_dir",
    "control",
)
LIKE = "see the experiments in eval/experiments for examples."


def read_value(value: Any) -> bool | str:
    """Return an option's value; raise ValueError for a list, a mapping or null."""
    if not isinstance(value, bool | str):
        raise ValueError("a single value")
    return value


def read_options_of(mapping: Any) -> Any:
    """Return options by their Python names; raise UserError for an option that the sweep sets."""
    options = _with_underscores(mapping)
    for name in options if isinstance(options, dict) else ():
        if name == SEED:
            raise UserError("an option sets the seed: give seeds instead.")
        if name in SWEEP_OPTIONS:
            raise UserError(f"an option sets {name}, which the sweep itself sets: leave it out.")
    return options


def read_scores_options(mapping: Any) -> Any:
    """Return options of eval.clip_scores; raise UserError for one of `SCORES_OPTIONS`."""
    options = _with_underscores(mapping)
    for name in options if isinstance(options, dict) else ():
        if name in SCORES_OPTIONS:
            raise UserError(
                f"an option sets {name}: use the other keys of scores instead, or leave it out."
            )
    return options


def read_condition(mapping: Any) -> Any:
    """Return the options of a condition; raise UserError for one that does not affect images."""
    options = read_scores_options(mapping)
    names = [field.name for field in fields(SamplingOptions)]
    for name in options if isinstance(options, dict) else ():
        if name not in names:
            raise UserError(
                f"{name} is not an option that changes images{did_you_mean(name, names)}: leave it"
                " out, or move it to scores.options."
            )
    return options


def _with_underscores(mapping: Any) -> Any:
    """Return a mapping with underscores in its names instead of dashes; {} for None."""
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        return mapping
    return {str(name).replace("-", "_"): value for name, value in mapping.items()}


def read_numbers(value: Any) -> tuple[int, ...]:
    """Return the numbers of a list, or of a text such as ``0..4`` (includes 4) or ``0,1,5``."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return tuple(read_integers(text, f'"{text}" is not a list of numbers'))


def require_different(values: list[Any]) -> list[Any]:
    """Return the list; raise UserError if it contains a value more than once."""
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{value} is in a list more than once: keep one.")
    return values


@dataclass(frozen=True)
class Guidance:
    """A kind of guidance."""

    # Model of the unconditional prediction: "adapter", "base", or a strength of the adapter
    source: float | str
    scale: float

    @property
    def label(self) -> str:
        """Name in figures and tables."""
        if self.source == BASE_GUIDANCE:
            return f"base's guidance {self.scale:g}"
        if self.source == ADAPTER_GUIDANCE:
            return f"guidance {self.scale:g}"
        return f"guidance {self.scale:g} from strength {self.source:g}"

    @property
    def text(self) -> str:
        """The form that experiments and command lines use, such as "adapter:4"."""
        return f"{self.source}:{self.scale:g}"


def read_guidances(value: Any) -> tuple[Guidance, ...]:
    """Return the kinds of guidance of a text such as ``adapter:4,0.5:4,base:2``, or of a list."""
    words = value if isinstance(value, list) else str(value).split(",")
    guidances = []
    for word in words:
        source, _, scale = str(word).strip().partition(":")
        sentence = f'"{word}" is not a kind of guidance: write adapter:4, base:2 or 0.5:4.'
        try:
            guidances.append(Guidance(read_guidance_source(source), float(scale)))
        except ValueError:
            raise UserError(sentence) from None
    return tuple(require_different(guidances))


@dataclass(frozen=True, eq=False)
class Condition:
    """Settings for sampling checkpoints: a kind of guidance and named options."""

    guidance: Guidance
    # "" for an experiment without named conditions
    name: str
    # Options of eval.clip_scores, in addition to the options for all conditions
    options: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Name in figures and tables, and the item of rows."""
        return condition_label(self.guidance, self.name)

    @property
    def folder(self) -> str:
        """Name of the folder of images and scores."""
        name = f"scores-{self.guidance.source}-{self.guidance.scale:g}"
        if self.name:
            name += f"-{self.name.replace(' ', '-')}"
        return name


def condition_label(guidance: Guidance, name: str) -> str:
    """Return the label of a condition from its kind of guidance and its name."""
    return f"{guidance.label} ({name})" if name else guidance.label


# Types of the values in the file, which pydantic checks
Value = Annotated[Any, BeforeValidator(read_value)]
Values = Annotated[dict[str, Value], BeforeValidator(read_options_of)]
Axis = Annotated[list[Value], Field(min_length=1)]
Numbers = Annotated[tuple[int, ...], BeforeValidator(read_numbers)]
Step = Annotated[int, Field(ge=1)]
# No dash: in folder names, a dash replaces a space.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._]*$")]
ConditionOptions = Annotated[dict[str, Value], BeforeValidator(read_condition)]


class Keys(BaseModel):
    """Base class of the file's parts: unknown keys are refused, and instances are immutable."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)


class Scores(Keys):
    """Settings for sampling and scoring the checkpoints of an experiment."""

    # ``--prompts`` of eval.clip_scores, or "heldout"
    prompts: str
    # Number of prompts to sample, starting with the first; None for all
    max_prompts: Annotated[int, Field(ge=1)] | None = None
    # Seeds of the images of each prompt
    seeds: Numbers = (0,)
    # Steps of the checkpoints that are sampled
    steps: Annotated[tuple[Step, ...], BeforeValidator(read_numbers)]
    guidances: Annotated[tuple[Guidance, ...], BeforeValidator(read_guidances)]
    # Further options of eval.clip_scores
    options: Annotated[dict[str, Value], BeforeValidator(read_scores_options)] = {}
    # Name of a condition -> its options of eval.clip_scores. All checkpoints are sampled in each
    # condition and with each kind of guidance; scores are compared with the first condition.
    conditions: dict[Name, ConditionOptions] = {}
    # Size of the models that sample and score, without quantization; 0 if they fit on any GPU
    memory_gigabytes: Annotated[float, Field(ge=0)] = 0.0

    def sampled_conditions(self) -> list[Condition]:
        """Return each named condition with each kind of guidance."""
        named_options = self.conditions or {"": {}}
        pairs = itertools.product(self.guidances, named_options.items())
        return [Condition(guidance, name, options) for guidance, (name, options) in pairs]


class Experiment(Keys):
    """The content of an experiment's file."""

    # YAML file of options that all runs share, or a list of such files
    recipe: str | list[str]
    # Training script
    script: str = IMAGE_SCRIPT
    # Further options of all runs; the options of a variant override them
    options: Values = {}
    # Label -> options
    variants: dict[str, Values] = {}
    # Option -> its values
    axes: Annotated[dict[str, Axis], BeforeValidator(read_options_of)] = {}
    # None for the recipe's seed
    seeds: Numbers | None = None
    # Label of the variant that the others are compared with; None for the first
    control: str | None = None
    # Key of ``metrics.jsonl``
    metric: str = HELDOUT_LOSS
    higher_is_better: bool = False
    # None for an experiment without samples
    scores: Scores | None = None


def read_experiment(
    path: Path,
    settings: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
    scores_keys: Mapping[str, Any] | None = None,
) -> Experiment:
    """Read an experiment from a file.

    Args:
        path: the file.
        settings: the ``NAME=VALUE`` words of ``--set``, which override the file's options.
        keys: values from the command line that replace keys of the file; None keeps the file's
            value.
        scores_keys: values from the command line that replace keys of ``scores``, in the same way.
    """
    if not path.is_file():
        raise UserError(f'there is no experiment "{path}": correct the name of the file.')
    content = read_options(path, f'the experiment "{path}"', "the command line")
    with add_source(f"{path}: "):
        if not isinstance(content, dict):
            raise UserError("an experiment is a mapping: write lines like recipe: FILE.yaml.")
        # Values of flags replace keys of the file before the check, so they are checked too.
        content |= _without_none(keys)
        score_values = _without_none(scores_keys)
        if score_values:
            if not isinstance(content.get("scores"), dict):
                flag = next(iter(score_values))
                raise UserError(f"it has no scores, but --{flag} belongs to scores: leave it out.")
            content["scores"] = {**content["scores"], **score_values}
        return parse(content, read_settings(settings))


def _without_none(keys: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (keys or {}).items() if value is not None}


def parse(content: Mapping[str, Any], options: Mapping[str, str]) -> Experiment:
    """Check the content of a file, and set further options of all runs."""
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        raise UserError(describe_validation_error(error)) from error
    experiment = experiment.model_copy(update={"options": {**experiment.options, **options}})
    # An option must have only one value in a run.
    for name, values in experiment.axes.items():
        require_different(values)
        in_variants = any(name in options for options in experiment.variants.values())
        if in_variants or name in experiment.options:
            raise UserError(f'"{name}" is an axis and is also set elsewhere: keep one of the two.')
    return experiment


def describe_validation_error(error: ValidationError) -> str:
    """Return a sentence on the most helpful of the problems in a file's content."""
    # Misspelled keys come first: they also cause the error that the correct key is missing.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    place = [str(part) for part in problem["loc"] if part not in ("str", "list[str]", "int")]
    name = ".".join(place[:3])
    reason = problem.get("ctx", {}).get("error")
    if isinstance(reason, UserError):
        return f"{name}: {reason}"
    if problem["type"] == "extra_forbidden":
        keys = Scores.model_fields if place[0] == "scores" else Experiment.model_fields
        hint = did_you_mean(place[-1], list(keys))
        return f'there is no key "{name}"{hint}: use {", ".join(keys)}.'
    if problem["type"] == "missing":
        return f'it has no "{name}": {LIKE}'
    return f'"{name}" can\'t be {reprlib.repr(problem["input"])}: {LIKE}'


def read_settings(words: Sequence[str]) -> dict[str, str]:
    """Return the options of the ``NAME=VALUE`` words of ``--set``."""
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
