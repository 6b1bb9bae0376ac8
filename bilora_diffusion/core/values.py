"""Allowed values of options: named choices and ranges of numbers.

They are defined here, not next to the code that uses them, because a command line is read before
torch and PEFT are imported.

The lower bound of a range is the smallest meaningful number. The upper bound is far larger than any
run needs, so that a typing error gives a message instead of a long wait or an out-of-memory error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any, NamedTuple

from .errors import UserError, did_you_mean
from .files import quoted


class OptimizerKind(NamedTuple):
    """Properties of an optimizer that are known before it is created."""

    state: float  # approximate size of its state, as a multiple of the trained weights
    package: str | None = None  # required package that is not a dependency of this one


# Kinds of optimizers by name; `train.optimizers` creates them.
OPTIMIZERS: Mapping[str, OptimizerKind] = MappingProxyType(
    {
        "adamw": OptimizerKind(2),
        "adamw8bit": OptimizerKind(0.5, "bitsandbytes"),
        "prodigy": OptimizerKind(4, "prodigyopt"),
    }
)

# Layers that get adapters.
ALL_LINEAR = "all-linear"  # every linear layer except the output head
ATTENTION = "attention"
FEED_FORWARD = "feed-forward"
CONVOLUTIONS = "convolutions"
ALL_LAYERS = "all"
# Groups of a denoiser's layers (`image.pipeline`).
LAYER_GROUPS = (ATTENTION, FEED_FORWARD, CONVOLUTIONS, ALL_LINEAR, ALL_LAYERS)

# Adapters and methods.
INITS = ("default", "gaussian", "pissa", "lora-ga")  # initializations of the primary
RHO_NORMS = ("scaled", "unscaled")
SCHEDULES = ("constant", "linear", "cosine")

# Model that makes the unconditional prediction in classifier-free guidance: one of these words, or
# the adapter's strength in this prediction, a number between 0 and 1 (`read_guidance_source`).
ADAPTER_GUIDANCE = "adapter"  # strength 1
BASE_GUIDANCE = "base"  # strength 0
# Words that `--timestep_shift` accepts besides numbers: the shift that the base model was trained
# with, the shift that its pipeline samples with, or no shift.
MODEL_SHIFT, PIPELINE_SHIFT, NO_SHIFT = "model", "pipeline", "none"
NF4 = "nf4"
# Precisions to which the denoiser's weights can be rounded for sampling.
BASE_PRECISIONS = ("int8", "int7", "int6", "int5", "int4", "int3", "int2", NF4)
# Number of evenly spaced noise levels of the held-out loss: 25, 125, ... 925 of 1,000 timesteps.
NOISE_LEVELS = 10

KINDS = ("seq2seq", "causal", "classification")  # of models
# Prompt formats of a causal language model.
TEMPLATES = ("auto", "chat", "alpaca", "plain")

# Prefix of the log names of all measures of held-out samples.
HELDOUT_PREFIX = "heldout_"
# Lower is better for these two; higher is better for scores of answers, such as "heldout_accuracy".
HELDOUT_LOSS = "heldout_loss"
HELDOUT_DISTANCE = "heldout_distance"
# Prefix of the log names of the held-out loss at single noise levels; the level follows.
BY_LEVEL = "heldout_loss_by_level/"
# Log name of the held-out loss's counterpart on the training samples.
TRAINING_GRID_LOSS = "train_grid_loss"
MEASURE_TITLES: Mapping[str, str] = MappingProxyType(
    {HELDOUT_LOSS: "held-out loss", HELDOUT_DISTANCE: "distance of samples"}
)


def measure_title(measure: str) -> str:
    """Return the name of a held-out measure in a sentence, such as "held-out exact match"."""
    if measure in MEASURE_TITLES:
        return MEASURE_TITLES[measure]
    return "held-out " + measure.removeprefix(HELDOUT_PREFIX).replace("_", " ")


def is_better(measure: str, value: float, earlier_value: float) -> bool:
    """Return whether a held-out measure's value is better than an earlier one."""
    if measure in (HELDOUT_LOSS, HELDOUT_DISTANCE):
        return value < earlier_value
    return value > earlier_value


# Prefix of the log names of the distance for single held-out images; the image's number follows.
DISTANCE_BY_PICTURE = "heldout_distance_of/"
# Values of ``--choose_by``: the distance between samples and held-out images, the held-out loss,
# and the score of answers to held-out rows.
BY_SAMPLES = "samples"
BY_LOSS = "loss"
BY_SCORE = "score"
# Values of ``--image_model``, which embeds images: the miniature's own model, and the prefix of
# ``dinov2:ID_OR_FOLDER``.
EMBEDDED = "embedded"
DINOV2 = "dinov2"


# Smallest normal fp32 number; smaller numbers may be treated as 0.
SMALLEST_NORMAL = 1.2e-38


@dataclass(frozen=True)
class Range:
    """The range of numbers that an option accepts."""

    maximum: int | float  # largest number, included
    reason: str  # why no larger number is allowed, as a clause that follows "since"
    at_least: int | None = None
    greater_than: int | None = None
    less_than: int | None = None  # needs ``at_least`` or ``greater_than``
    multiple_of: int | None = None
    instead: str = ""  # alternative to a larger number, appended to the advice

    @property
    def or_zero(self) -> Range:
        """The same range, including 0."""
        return dataclasses.replace(self, at_least=0, greater_than=None)

    def check(self, label: str, value: Any, smallest: float = SMALLEST_NORMAL) -> None:
        """Check that a value is in the range.

        Args:
            label: name of the value in the message.
            value: any value.
            smallest: smallest allowed absolute value of a number other than 0.

        Raises:
            UserError: the value is not in the range.
        """
        fix = self._fix(value)
        if not fix and 0 < abs(value) < smallest:
            zero = "" if self._fix(0) else "0 or "
            fix = f"give {zero}at least {smallest:.2g}, since a smaller number may be 0 in fp32"
        if not fix:
            return
        text = f"{value!r:.80}"
        if type(value) is int and abs(value) >= 10**30:  # too long for a sentence
            text = f"a number of {len(str(abs(value)))} digits"
        raise UserError(f"{label} is {text}{self._hint(value, smallest)}: {fix}.")

    def _hint(self, value: Any, smallest: float) -> str:
        """Return " (did you mean 2e-4?)" for 2e4, whose exponent probably lacks its sign, or "".

        Only floats of at least 10,000 get a hint, since users write them with an exponent.
        """
        if type(value) is not float or not 1e4 <= value < math.inf:
            return ""
        mantissa, exponent = f"{value:.10e}".split("e")
        suggestion = f"{mantissa.rstrip('0').rstrip('.')}e-{int(exponent)}"
        if self._fix(float(suggestion)) or float(suggestion) < smallest:
            return ""
        return f" (did you mean {suggestion}?)"

    def _fix(self, value: Any) -> str | None:
        """Return the advice for a value that is not in the range; None for one that is."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return "give a number"
        number: Any = value
        if isinstance(value, float) and not math.isfinite(value):
            return "give a finite number"
        if number > self.maximum:
            return f"give at most {self.maximum}, since {self.reason}"
        is_low = self.at_least is not None and number < self.at_least
        is_low_or_equal = self.greater_than is not None and number <= self.greater_than
        has_two_open_ends = self.less_than is not None and self.greater_than is not None
        if has_two_open_ends and (is_low_or_equal or number >= self.less_than):
            return f"give a number above {self.greater_than} and below {self.less_than}"
        if self.less_than is not None and (is_low or number >= self.less_than):
            return f"give a number from {self.at_least} up to, but not including, {self.less_than}"
        if self.multiple_of and (is_low or number % self.multiple_of):
            nearest = round(number / self.multiple_of) * self.multiple_of
            example = max(self.multiple_of, nearest)
            return f"give a multiple of {self.multiple_of}, such as {example}"
        if is_low:
            return f"give {self.at_least} or more{self.instead}"
        if is_low_or_equal:
            return f"give a number above {self.greater_than}{self.instead}"
        return None


RANKS = Range(
    16_384,
    "a rank above the smaller side of a layer adds nothing, and no known model has a wider layer",
    at_least=1,
)
SCALES = Range(
    1e6,
    "the adapter's output is scaled by alpha / rank, which would overflow half precision",
    greater_than=0,
)
RATES = Range(1e4, "one step would be larger than any weight", greater_than=0)
BATCHES = Range(65_536, "no device holds a larger batch", at_least=1)
STEPS = Range(10**9, "that many take three years at ten steps per second", at_least=1)
ROWS = Range(10**9, "no data set here has more", at_least=1)
TOKENS = Range(10**7, "no model reads longer texts", at_least=1)
WORKERS = Range(1024, "each is a separate process", at_least=1)
FACTORS = Range(1e6, "a larger weight would drown all other terms", at_least=0)
DECAYS = Range(1e4, "one step would remove more than the whole weight", at_least=0)
SHARES = Range(1, "it is a share", at_least=0, less_than=1)
SPLITS = Range(1, "it is a share", greater_than=0, less_than=1)
SIDES = Range(8192, "the autoencoder would need over 34 GB per layer", at_least=8, multiple_of=8)
SAMPLER_STEPS = Range(1000, "no scheduler here has more noise levels", at_least=1)
GUIDANCES = Range(100, "far smaller values already spoil images", at_least=0)
# Noise on weights, in standard deviations.
NOISES = Range(10, "far smaller values already spoil images", at_least=0)
STRENGTHS = Range(10, "far smaller values already spoil images", at_least=-10)


# The adapter's strength in the unconditional prediction in this project's own evaluations. In
# results/README.md (F17 and F18), samples never score clearly lower than at strength 1, and samples
# in strong styles score higher.
EVALUATED_STRENGTH = 0.5


def read_guidance_source(value: float | str) -> float | str:
    """Parse the source of the unconditional prediction: "adapter", "base" or a number from 0 to 1.

    Returns:
        A number between 0 and 1, or a word: 1 becomes "adapter" and 0 becomes "base".

    Raises:
        ValueError: the value is none of these; the message is the advice for the user.
    """
    if value in (ADAPTER_GUIDANCE, BASE_GUIDANCE):
        return value
    advice = f"give {ADAPTER_GUIDANCE}, {BASE_GUIDANCE} or a number from 0 to 1"
    try:
        strength = float(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(advice) from error
    if not 0 <= strength <= 1:  # NaN too
        raise ValueError(advice)
    return {1.0: ADAPTER_GUIDANCE, 0.0: BASE_GUIDANCE}.get(strength, strength)


def unconditional_strength(guidance_from: float | str) -> float:
    """Return the adapter's strength in the unconditional prediction: "adapter" is 1, "base" 0."""
    words = {ADAPTER_GUIDANCE: 1.0, BASE_GUIDANCE: 0.0}
    if isinstance(guidance_from, str):
        return words[guidance_from]
    return guidance_from


def guidance_title(guidance_from: float | str) -> str:
    """Return the name of the unconditional prediction's model, as it follows "guidance from"."""
    titles = {ADAPTER_GUIDANCE: "the adapter", BASE_GUIDANCE: "the base model"}
    if isinstance(guidance_from, str):
        return titles[guidance_from]
    return f"the adapter at strength {guidance_from:g}"


def check_choice(label: str, value: Any, choices: Iterable[Any]) -> None:
    """Check that a value is one of the choices.

    Args:
        label: name of the value in the message.
        value: the value.
        choices: allowed values; ``value`` is compared with their texts.

    Raises:
        UserError: the value is not one of the choices, which the message lists.
    """
    names = [str(choice) for choice in choices]
    if value not in names:
        hint = did_you_mean(str(value), names)
        raise UserError(f"{label} is {quoted(value)}{hint}: use one of {', '.join(names)}.")
