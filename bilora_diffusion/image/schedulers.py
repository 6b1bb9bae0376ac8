"""Schedulers for generating images: ``--sampling_scheduler NAME[:KEY=VALUE,...]``.

    build_scheduler(pipeline.scheduler, "EulerDiscreteScheduler:timestep_spacing=trailing")

A distilled model, or a LoRA file that distills one, needs the scheduler that it was distilled for.
Training does not use this scheduler: the noise levels of training come from `noise_schedules`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import diffusers
from diffusers.schedulers import KarrasDiffusionSchedulers

from ..core.errors import UserError, as_user_error, did_you_mean
from ..core.files import quoted
from ..core.values import check_choice

FLAG = "--sampling_scheduler"
# Schedulers of flow-matching models. The pipelines of these models pass sigmas and a shift, which
# most other schedulers do not accept.
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
# Schedulers of models with EDM preconditioning.
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
# Schedulers that can't use the images' generators: their noise has one seed for all images.
UNSEEDED_SCHEDULERS = ("DPMSolverSDEScheduler",)
# Schedulers for distilled models. diffusers' list of compatible schedulers does not have them.
FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")


def possible_schedulers(scheduler: str) -> tuple[str, ...]:
    """Return the names of the schedulers that can replace a model's scheduler.

    Args:
        scheduler: class name of the model's scheduler.
    """
    if scheduler in FLOW_SCHEDULERS:
        return FLOW_SCHEDULERS
    if scheduler in EDM_SCHEDULERS:
        return EDM_SCHEDULERS
    names = [entry.name for entry in KarrasDiffusionSchedulers]
    excluded = (*EDM_SCHEDULERS, *UNSEEDED_SCHEDULERS)
    return (*FEW_STEP_SCHEDULERS, *(name for name in names if name not in excluded))


def read_scheduler(text: str, model_scheduler: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Parse a ``--sampling_scheduler`` to a scheduler class and its settings.

    Args:
        text: NAME or NAME:KEY=VALUE,KEY=VALUE.
        model_scheduler: class name of the model's scheduler; None to skip the check that the
            scheduler fits the model.

    Raises:
        UserError: the scheduler does not fit the model, or a setting is unknown.
    """
    name, _, words = text.partition(":")
    if model_scheduler is not None:
        check_choice(FLAG, name, possible_schedulers(model_scheduler))
    kind: Any = getattr(diffusers, name)
    setting_names = list(inspect.signature(kind.__init__).parameters)[1:]  # without self
    settings: dict[str, Any] = {}
    for word in filter(None, words.split(",")):
        key, equals, value = word.partition("=")
        if not equals or key not in setting_names:
            hint = did_you_mean(key, setting_names)
            raise UserError(
                f"{FLAG} {quoted(text)} has {quoted(word)}{hint}: write KEY=VALUE with a setting of"
                f" {name}: {', '.join(setting_names)}."
            )
        settings[key] = _read_value(value)
    return kind, settings


def build_scheduler(model_scheduler: Any, text: str | None) -> Any:
    """Build a sampling scheduler from a model's scheduler, whose state does not change.

    Args:
        text: a value of ``--sampling_scheduler``; None for the class and settings of the model's
            scheduler.
    """
    config = model_scheduler.config
    if text is None:
        return type(model_scheduler).from_config(config)
    kind, settings = read_scheduler(text, type(model_scheduler).__name__)
    with _explain_errors(text):
        return kind.from_config(config, **settings)


def check_scheduler(text: str, config: Mapping[str, Any], steps: Iterable[int]) -> None:
    """Raise UserError if a ``--sampling_scheduler`` fails with a model or with a number of steps.

    Args:
        text: the value of ``--sampling_scheduler``.
        config: configuration of the model's scheduler; it must contain ``_class_name``.
        steps: the numbers of sampling steps that the run uses.
    """
    kind, settings = read_scheduler(text, str(config["_class_name"]))
    with _explain_errors(text):
        scheduler = kind.from_config(dict(config), **settings)
    # The shift of a flow model depends on the size of the image; any value will do here.
    shift = {"mu": 1.0} if config["_class_name"] in FLOW_SCHEDULERS else {}
    for number in sorted(set(steps)):
        with _explain_errors(text, number):
            scheduler.set_timesteps(number, **shift)


def give_generators(scheduler: Any, generators: Sequence[Any]) -> None:
    """Make a scheduler take its noise from the images' generators.

    Pipelines of flow models call ``step`` without a generator, so FlowMatchLCMScheduler would use
    the global generator.

    Args:
        scheduler: the scheduler of the next pipeline call, which is modified.
        generators: one generator for each image of this call.
    """
    if "generator" in inspect.signature(scheduler.step).parameters:
        # Pipelines inspect the parameters of ``step``, which a partial function keeps.
        scheduler.step = partial(scheduler.step, generator=list(generators))


def _explain_errors(text: str, steps: int | None = None) -> AbstractContextManager[None]:
    """Return a context manager that turns a scheduler's error into a one-sentence `UserError`."""
    sentence = f"{FLAG} {quoted(text)} can't be used"
    if steps is not None:
        sentence += f" with {steps} steps"
    return as_user_error(sentence, "correct its settings, or the number of steps")


def _read_value(word: str) -> Any:
    """Parse a setting's value: a boolean, None, a number, or the word itself."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if word.lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
