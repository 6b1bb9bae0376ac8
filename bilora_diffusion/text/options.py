"""The configuration of a text run: every option, checked and completed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..choices import ALL_LINEAR
from ..config.checks import check
from ..config.command_line import CommandLine
from ..config.notes import tell
from ..config.outputs import TextOutputOptions
from ..config.resolve import resolve_training
from ..config.run_config import RunConfig
from .checks import check_inputs
from .inputs import TextDataOptions, TextModelOptions
from .training_options import (
    EvaluationOptions,
    TextAdapterOptions,
    TextOptimizerOptions,
    TextStepOptions,
)

GROUPS = (
    TextModelOptions,
    TextDataOptions,
    TextAdapterOptions,
    TextStepOptions,
    TextOptimizerOptions,
    EvaluationOptions,
    TextOutputOptions,
)
ALTERNATIVES = (
    ("task", "train_file"),
    ("max_train_steps", "num_train_epochs"),
    ("warmup_ratio", "lr_warmup_steps"),
)
WITHOUT_INFLUENCE = frozenset(
    name
    for group in (EvaluationOptions, TextOutputOptions)
    for name in (field.name for field in fields(group))
) | {
    *("allow_tf32", "attn_implementation", "gradient_checkpointing"),
    "cache_dir",
    "local_rank",
    "max_eval_samples",
    "overwrite_cache",
    "preprocessing_num_workers",
    "validation_file",
}
"""Options that a resumed run may change freely: they do not touch what is learned, or only in the
last digits, as another card does."""
EPOCHS = 3
WARMUP_RATIO = 0.03  # Tables A4 to A7
RHO = {"bilora": 0.05, "lora-sam": 0.01, "flat-lora": 0.05}
"""Radii on GLUE (Appendix H.1) and of Li et al. 2024b on T5 and Llama."""


@dataclass(frozen=True)
class TextConfig(
    TextModelOptions,
    TextDataOptions,
    TextAdapterOptions,
    TextStepOptions,
    TextOptimizerOptions,
    EvaluationOptions,
    TextOutputOptions,
    RunConfig,
):
    """Every option of the script, flat. Made by ``parse_text``, which checks and completes it.

    After it, ``mixed_precision``, ``lora_alpha``, ``rho``, ``optimizer`` (in lower case) and
    ``warmup_ratio`` are decided, and ``num_train_epochs`` is None only where steps count.
    """

    groups: ClassVar[tuple[Any, ...]] = GROUPS
    without_influence: ClassVar[frozenset[str]] = WITHOUT_INFLUENCE

    @property
    def targets(self) -> str | tuple[str, ...]:
        """``--target_modules`` as an adapter takes it."""
        names = tuple(self.target_modules)
        return ALL_LINEAR if names == (ALL_LINEAR,) else names

    def warmup_steps(self, num_steps: int) -> int:
        """Given as steps, or as a share of all, rounded up as Transformers does."""
        if self.lr_warmup_steps is not None:
            return self.lr_warmup_steps
        return math.ceil((self.warmup_ratio or 0) * num_steps)


def parse_text(argv: Sequence[str] | None = None) -> TextConfig:
    """Read the command line (and the recipe it names), check it and complete it.

    Nothing is downloaded or loaded. ``--help`` prints and exits.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Raises:
        UserError: a value or a combination that can't be honoured; it names the fix.
    """
    line = CommandLine(
        GROUPS,
        description="Fine-tune a T5, a causal language model or a text classifier with Bi-LoRA or"
        " LoRA. Flags that Transformers' and TRL's scripts have keep their names; defaults are"
        " those of the Bi-LoRA paper's Tables A4 to A7.",
        usage="%(prog)s --model_name_or_path MODEL {--task TASK,--train_file FILE} [flags]",
    )
    values, given = line.read(argv, ALTERNATIVES)
    values = resolve(values, given)
    values, notes = check(values, given, line.defaults(), inputs=check_inputs)
    tell(notes)
    return TextConfig(**values)


def resolve(values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
    """Fill in what was not given.

    Raises:
        UserError: accelerate was launched in a precision that training does not have.
    """
    if values["rho"] is None:
        values = {**values, "rho": RHO.get(values["method"])}
    values = resolve_training(values, given)
    if values["num_train_epochs"] is None and values["max_train_steps"] is None:
        values["num_train_epochs"] = EPOCHS
    if values["warmup_ratio"] is None and values["lr_warmup_steps"] is None:
        values["warmup_ratio"] = 0.0 if values["lr_scheduler"] == "constant" else WARMUP_RATIO
    return values
