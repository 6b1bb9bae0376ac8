"""Values that an option can have: choices by name, and ranges of numbers.

They are here, and not next to the code that uses them, because a command line is read before
torch and PEFT are imported.

The lower bound of a range is the least number with a meaning. The upper bound is far beyond what
any run needs, so that a typing error ends in a sentence and not in a long wait or a full memory.
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
    """What is known of an optimizer before it is made."""

    state: float  # size of its state, roughly, in units of the weights that it trains
    package: str | None = None  # the package that it needs, if not a dependency of this one


# Kinds of optimizers by name; `train.optimizers` makes them.
OPTIMIZERS: Mapping[str, OptimizerKind] = MappingProxyType(
    {
        "adamw": OptimizerKind(2),
        "adamw8bit": OptimizerKind(0.5, "bitsandbytes"),
        "prodigy": OptimizerKind(4, "prodigyopt"),
    }
)

# Layers that get adapters.
ALL_LINEAR = "all-linear"  # every one but the output head
ATTENTION = "attention"
FEED_FORWARD = "feed-forward"
CONVOLUTIONS = "convolutions"
ALL_LAYERS = "all"
# Names of groups of a denoiser's layers (`image.pipeline`).
LAYER_GROUPS = (ATTENTION, FEED_FORWARD, CONVOLUTIONS, ALL_LINEAR, ALL_LAYERS)

# Adapters and methods.
INITS = ("default", "gaussian", "pissa", "lora-ga")  # first values of the primary
RHO_NORMS = ("scaled", "unscaled")
SCHEDULES = ("constant", "linear", "cosine")

# Model of the unconditional prediction in classifier-free guidance: one of these words, or a number
# between 0 and 1, the strength of the adapter in that prediction (`read_guidance_source`).
ADAPTER_GUIDANCE = "adapter"  # strength 1
BASE_GUIDANCE = "base"  # strength 0
# Values of `--timestep_shift`: as the model was trained, as its pipeline samples, none.
MODEL_SHIFT, PIPELINE_SHIFT, NO_SHIFT = "model", "pipeline", "none"
NF4 = "nf4"
# Precisions to which the denoiser's weights are rounded in samples: bits, or NF4.
BASE_PRECISIONS = ("int8", "int7", "int6", "int5", "int4", "int3", "int2", NF4)
# Number of noise levels of the held-out loss, evenly spaced: 25, 125, ... 925 of 1,000 steps.
NOISE_LEVELS = 10

KINDS = ("seq2seq", "causal", "classification")  # of models
# Forms in which a causal language model gets a question.
TEMPLATES = ("auto", "chat", "alpaca", "plain")

# Start of the name in the log of what is measured on held-out samples.
HELDOUT_PREFIX = "heldout_"
# Less is better of these two, and more of the scores of answers, such as "heldout_accuracy".
HELDOUT_LOSS = "heldout_loss"
HELDOUT_DISTANCE = "heldout_distance"
# Start of the name of the held-out loss at one noise level, which follows.
BY_LEVEL = "heldout_loss_by_level/"
# Name of the held-out loss's counterpart on the training samples.
TRAINING_GRID_LOSS = "train_grid_loss"
MEASURE_TITLES: Mapping[str, str] = MappingProxyType(
    {HELDOUT_LOSS: "held-out loss", HELDOUT_DISTANCE: "distance of samples"}
)


def measure_title(measure: str) -> str:
    """What a sentence calls a measure of held-out samples, such as "held-out exact match"."""
    if measure in MEASURE_TITLES:
        return MEASURE_TITLES[measure]
    return "held-out " + measure.removeprefix(HELDOUT_PREFIX).replace("_", " ")


def is_better(measure: str, value: float, earlier_value: float) -> bool:
    """Test that a value of a measure of held-out samples is better than an earlier one."""
    if measure in (HELDOUT_LOSS, HELDOUT_DISTANCE):
        return value < earlier_value
    return value > earlier_value


# Start of the name of the distance for one held-out picture, before the picture's number.
DISTANCE_BY_PICTURE = "heldout_distance_of/"
# Values of ``--choose_by``: distance of samples to held-out pictures, held-out loss, and score of
# the answers to held-out rows.
BY_SAMPLES = "samples"
BY_LOSS = "loss"
BY_SCORE = "score"
# The miniature's scorer, where a model that embeds images is asked for.
EMBEDDED = "embedded"
# Kind of such a model, in ``dinov2:ID_OR_FOLDER``.
DINOV2 = "dinov2"


# Smallest normal number of 32 bits; the arithmetic may take a smaller one for 0.
SMALLEST_NORMAL = 1.2e-38


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have."""

    maximum: int | float  # the largest
    reason: str  # why none is larger, as the end of a sentence
    at_least: int | None = None
    greater_than: int | None = None
    less_than: int | None = None  # only together with ``at_least`` or ``greater_than``
    multiple_of: int | None = None
    instead: str = ""  # what else the user can do, as the end of a sentence

    @property
    def or_zero(self) -> Range:
        """The same range, and 0."""
        return dataclasses.replace(self, at_least=0, greater_than=None)

    def check(self, label: str, value: Any, smallest: float = SMALLEST_NORMAL) -> None:
        """Refuse a value out of the range.

        Args:
            label: what the user calls the value.
            value: any value.
            smallest: a number other than 0 below it is refused too.

        Raises:
            UserError: the value is out of the range.
        """
        fix = self._fix(value)
        if not fix and 0 < abs(value) < smallest:
            fix = f"give 0 or at least {smallest:.2g}: a smaller number is 0 in fp32"
        if not fix:
            return
        text = f"{value!r:.80}"
        if type(value) is int and abs(value) >= 10**30:  # too long for a sentence
            text = f"a number of {len(str(abs(value)))} digits"
        raise UserError(f"{label} is {text}{self._hint(value, smallest)}: {fix}.")

    def _hint(self, value: Any, smallest: float) -> str:
        """ " (did you mean 2e-4?)" for 2e4, whose exponent seems to lack its sign; or "".

        Only of floats from 10,000 on, which nobody writes out.
        """
        if type(value) is not float or not 1e4 <= value < math.inf:
            return ""
        mantissa, exponent = f"{value:.10e}".split("e")
        suggestion = f"{mantissa.rstrip('0').rstrip('.')}e-{int(exponent)}"
        if self._fix(float(suggestion)) or float(suggestion) < smallest:
            return ""
        return f" (did you mean {suggestion}?)"

    def _fix(self, value: Any) -> str | None:
        """The advice for a number out of the range; None for one in it."""
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
    "the adapter's output is scaled by alpha / rank, and half precision ends there",
    greater_than=0,
)
RATES = Range(1e4, "one step would be larger than any weight", greater_than=0)
BATCHES = Range(65_536, "no device holds a larger batch", at_least=1)
STEPS = Range(10**9, "at ten steps a second that many take three years", at_least=1)
ROWS = Range(10**9, "no data set here has more", at_least=1)
TOKENS = Range(10**7, "no model reads longer texts", at_least=1)
WORKERS = Range(1024, "each is a process of its own", at_least=1)
FACTORS = Range(1e6, "a larger weight would drown all other terms", at_least=0)
DECAYS = Range(1e4, "one step would take away more than the whole weight", at_least=0)
SHARES = Range(1, "it is a share", at_least=0, less_than=1)
SPLITS = Range(1, "it is a share", greater_than=0, less_than=1)
SIDES = Range(
    8192, "a larger image alone takes the autoencoder over 34 GB a layer", at_least=8, multiple_of=8
)
SAMPLER_STEPS = Range(1000, "no scheduler here has more noise levels", at_least=1)
GUIDANCES = Range(100, "images are spoiled by far less", at_least=0)
NOISES = Range(10, "images are spoiled by far less", at_least=0)  # on weights, in deviations
STRENGTHS = Range(10, "images are spoiled by far less", at_least=-10)


# Strength of the adapter in the unconditional prediction of this project's own evaluations: on six
# sets of images none is further from held-out ones than with 1, and styles are much closer (F17).
EVALUATED_STRENGTH = 0.5


def read_guidance_source(value: float | str) -> float | str:
    """Read the model of the unconditional prediction: "adapter", "base" or a number from 0 to 1.

    Returns:
        A number between 0 and 1, or a word: 1 is "adapter", and 0 is "base".

    Raises:
        ValueError: its text is the advice.
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
    """Strength of the adapter in the unconditional prediction: 1 for "adapter", 0 for "base"."""
    words = {ADAPTER_GUIDANCE: 1.0, BASE_GUIDANCE: 0.0}
    if isinstance(guidance_from, str):
        return words[guidance_from]
    return guidance_from


def guidance_title(guidance_from: float | str) -> str:
    """Title of the model of the unconditional prediction, as it follows "guidance from"."""
    titles = {ADAPTER_GUIDANCE: "the adapter", BASE_GUIDANCE: "the base model"}
    if isinstance(guidance_from, str):
        return titles[guidance_from]
    return f"the adapter at strength {guidance_from:g}"


def check_choice(label: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is none of the choices.

    Args:
        label: what the user calls the value.
        value: the value.
        choices: compared by their texts.

    Raises:
        UserError: it names the choices.
    """
    names = [str(choice) for choice in choices]
    if value not in names:
        hint = did_you_mean(str(value), names)
        raise UserError(f"{label} is {quoted(value)}{hint}: use one of {', '.join(names)}.")
