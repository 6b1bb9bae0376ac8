"""Values that an option can have: choices by name, and ranges of numbers.

They stand here because a command line is read before torch and PEFT are imported.

What a number is bounded by from below is what makes sense; the bounds from above are far beyond
what any run needs: a typing error is to end in a sentence, not in a wait or in a full memory.
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
    """Facts about an optimizer before it is made."""

    state: float  # what it keeps, in units of the weights that it trains, roughly
    package: str | None = None  # that it needs beside this one's dependencies


OPTIMIZERS: Mapping[str, OptimizerKind] = MappingProxyType(
    {
        "adamw": OptimizerKind(2),
        "adamw8bit": OptimizerKind(0.5, "bitsandbytes"),
        "prodigy": OptimizerKind(4, "prodigyopt"),
    }
)
"""They are made in `train.optimizers`."""

ALL_LINEAR = "all-linear"
"""Every linear layer but the output head."""
ATTENTION = "attention"
FEED_FORWARD = "feed-forward"
CONVOLUTIONS = "convolutions"
ALL_LAYERS = "all"
LAYER_GROUPS = (ATTENTION, FEED_FORWARD, CONVOLUTIONS, ALL_LINEAR, ALL_LAYERS)
"""Names of groups of a denoiser's layers (`image.pipeline`)."""
INITS = ("default", "gaussian", "pissa", "lora-ga")
"""First values of the primary."""
AUTO = "auto"
"""A radius that sets itself."""
SAMPLE = "sample"
"""Of `--auxiliaries`: one for each."""
RHO_NORMS = ("scaled", "unscaled")
BALLS = ("global", "per-layer", "none")
DIRECTIONS = ("ascent", "descent")
SCHEDULES = ("constant", "linear", "cosine")
ADAPTER_GUIDANCE, BASE_GUIDANCE = GUIDANCE_SOURCES = ("adapter", "base")
"""Model of the unconditional prediction in classifier-free guidance."""
KINDS = ("seq2seq", "causal", "classification")
"""The kinds of model that text is for."""
TEMPLATES = ("auto", "chat", "alpaca", "plain")
"""Forms in which a causal language model gets a question."""
HELDOUT_LOSS, HELDOUT_DISTANCE = "heldout_loss", "heldout_distance"
"""What is measured on held-out samples, by its name in the log: less is better."""
MEASURE_TITLES: Mapping[str, str] = MappingProxyType(
    {HELDOUT_LOSS: "held-out loss", HELDOUT_DISTANCE: "distance of samples"}
)
BY_SAMPLES, BY_LOSS = JUDGES = ("samples", "loss")
"""What `--fit` and the best step go by: distance of samples to held-out pictures, or the loss."""
EMBEDDED, DINOV2 = "embedded", "dinov2"
"""Models that embed images: the miniature's scorer, and the kind in ``dinov2:ID_OR_FOLDER``."""
NOISE_LEVELS = 10
"""Of the held-out grid, evenly spaced over the schedule (25, 125, ... 925 of 1,000)."""


SMALLEST = 1.2e-38
"""Of 32-bit numbers; what is smaller counts as 0 in the arithmetic."""


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have."""

    maximum: int | float  # the largest
    reason: str  # why none is larger, as the end of a sentence
    at_least: int | None = None
    greater_than: int | None = None
    less_than: int | None = None  # beside ``at_least``
    multiple_of: int | None = None  # what divides it
    instead: str = ""  # what to do instead of giving a number in the range

    @property
    def or_zero(self) -> Range:
        """The same range, and 0."""
        return dataclasses.replace(self, at_least=0, greater_than=None)

    def check(self, label: str, value: Any, smallest: float = SMALLEST) -> None:
        """Refuse a number out of the range, and one other than 0 below ``smallest``."""
        fix = self._fix(value)
        if not fix and 0 < abs(value) < smallest:
            fix = "give a larger number, or 0, which it is in 32-bit arithmetic"
        if fix:
            long = type(value) is int and abs(value) >= 10**30
            text = f"a number of {len(str(abs(value)))} digits" if long else f"{value!r:.80}"
            raise UserError(f"{label} is {text}: {fix}.")

    def _fix(self, value: Any) -> str | None:
        """The advice for a number out of the range; None for one in it."""
        if isinstance(value, bool) or not isinstance(value, Real):
            return "give a number"
        number: Any = value
        if isinstance(value, float) and not math.isfinite(value):
            return "give a finite number"
        if number > self.maximum:
            return f"give at most {self.maximum}, since {self.reason}"
        low = self.at_least is not None and number < self.at_least
        if self.less_than is not None and (low or number >= self.less_than):
            return f"give a number from {self.at_least} up to, but not including, {self.less_than}"
        if self.multiple_of and (low or number % self.multiple_of):
            near = max(self.multiple_of, round(number / self.multiple_of) * self.multiple_of)
            return f"give a multiple of {self.multiple_of}, such as {near}"
        if low:
            return f"give {self.at_least} or more{self.instead}"
        if self.greater_than is not None and number <= self.greater_than:
            return f"give a number above {self.greater_than}{self.instead}"
        return None


RANKS = Range(
    16_384, "a rank above a layer's smaller side adds nothing, and no model has a wider", at_least=1
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
FACTORS = Range(1e6, "what it weighs would drown everything else", at_least=0)
DECAYS = Range(1e4, "one step would take away more than the whole weight", at_least=0)
SHARES = Range(1, "it is a share", at_least=0, less_than=1)
SIDES = Range(
    8192, "a larger image alone takes the autoencoder over 34 GB a layer", at_least=8, multiple_of=8
)
SAMPLER_STEPS = Range(1000, "no scheduler here has more noise levels", at_least=1)
GUIDANCES = Range(100, "images are spoiled by far less", at_least=0)
STRENGTHS = Range(10, "images are spoiled by far less", at_least=-10)


def check_choice(label: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuse a value that is none of the choices."""
    names = [str(choice) for choice in choices]
    if value not in names:
        hint = did_you_mean(str(value), names)
        raise UserError(f"{label} is {quoted(value)}{hint}: use one of {', '.join(names)}.")
