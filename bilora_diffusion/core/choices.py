"""Values of options, for command lines and for the code that acts on them.

They stand here because a command line is read before torch and PEFT are imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


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
NOISE_LEVELS = 10
"""Of the held-out grid, evenly spaced over the schedule (25, 125, ... 925 of 1,000)."""
