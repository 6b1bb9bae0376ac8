"""Configuration of a text run: all options, their derived defaults and their checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

from ..config import resolving
from ..config.derived import Rule, default_validation_loss_steps, derive
from ..config.lora_sources import LoraSource
from ..config.run import RunConfig
from ..core.errors import UserError
from ..core.files import TABLES, is_file
from ..core.values import ALL_LINEAR, BY_SCORE, HELDOUT_LOSS, HELDOUT_PREFIX
from .options import (
    EvaluationOptions,
    TextAdapterOptions,
    TextDataOptions,
    TextMethodFlags,
    TextModelOptions,
    TextOptimizerOptions,
    TextOutputOptions,
    TextStepOptions,
    TextStoppingOptions,
)

GROUPS = (
    TextModelOptions,
    TextDataOptions,
    TextAdapterOptions,
    TextMethodFlags,
    TextStepOptions,
    TextStoppingOptions,
    TextOptimizerOptions,
    EvaluationOptions,
    TextOutputOptions,
)
# Defaults from the paper's Tables A4 to A7; the ratio is a share of the optimizer steps.
EPOCHS = 3
WARMUP_RATIO = 0.03
# Options that affect the score of generated answers.
ANSWER_OPTIONS = frozenset({"max_predictions", "generation_max_new_tokens"})


@dataclass(frozen=True)
class TextConfig(
    TextModelOptions,
    TextDataOptions,
    TextAdapterOptions,
    TextMethodFlags,
    TextStepOptions,
    TextStoppingOptions,
    TextOptimizerOptions,
    EvaluationOptions,
    TextOutputOptions,
    RunConfig,
):
    """All options of the text script; `resolve` builds it from a command line.

    `resolve` fills in the defaults: ``task_type`` is the model's kind and never "auto",
    ``optimizer`` is in lower case, and ``num_train_epochs`` is None only if ``max_train_steps`` is
    given.
    """

    given_options: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    lora_sources: dict[str, LoraSource] = field(default_factory=dict)

    modality: ClassVar[str] = "text"
    groups: ClassVar[tuple[type, ...]] = GROUPS
    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (
        ("task", "train_file"),
        ("max_train_steps", "num_train_epochs"),
        ("warmup_ratio", "lr_warmup_steps"),
    )
    description: ClassVar[str] = (
        "Fine-tune a T5 model, a causal language model or a text classifier with Bi-LoRA or LoRA."
        " Flags that also exist in Transformers' or TRL's scripts have the same names there; the"
        " defaults come from Tables A4 to A7 of the Bi-LoRA paper."
    )
    usage: ClassVar[str] = (
        "%(prog)s --model_name_or_path MODEL {--task TASK,--train_file FILE} [flags]"
    )

    @classmethod
    def resolve(cls, argv: Sequence[str] | None = None) -> Self:
        """Build the configuration from a command line; see `config.resolving`."""
        return resolving.resolve(cls, argv)

    def derive_defaults(self) -> Self:
        from .models import TextSource  # imports torch

        cfg = self
        # First, since the rules read the kind. If no model is given, the constraints report it.
        if cfg.model_name_or_path is not None:
            cfg = replace(cfg, task_type=TextSource(cfg).kind)
        return derive(cfg, TEXT_DEFAULTS)

    def check_inputs(self) -> None:
        if self.task:
            from . import catalog

            catalog.get(self.task)
        if self.chooses_by_score and not self.metrics:
            raise UserError(
                f"--choose_by score can't be used, since the task {self.task} has no metric for its"
                " free-text answers: use --choose_by loss."
            )
        files = {"train_file": self.train_file, "validation_file": self.validation_file}
        for name, file in files.items():
            if not file:
                continue
            path = Path(file).expanduser()
            if not is_file(path) or path.suffix.lower() not in TABLES:
                fault = "is not a file of rows" if path.exists() else "does not exist"
                kinds = ", ".join(TABLES)
                raise UserError(f'--{name} "{path}" {fault}: give a file that ends in {kinds}.')

    @property
    def base_model(self) -> str:
        return self.model_name_or_path

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the answers to held-out rows; ``--choose_by score`` uses the first one."""
        from . import catalog

        if self.task:
            return catalog.get(self.task).metrics
        return catalog.FILE_METRICS[self.task_type]

    @property
    def chooses_by_score(self) -> bool:
        """Whether the score of the answers decides which weights the run exports."""
        return self.depends_on_heldout and self.choose_by == BY_SCORE

    @property
    def heldout_measure(self) -> str:
        return HELDOUT_PREFIX + self.metrics[0] if self.chooses_by_score else HELDOUT_LOSS

    @property
    def measures_samples(self) -> bool:
        # A classifier's predictions come with its loss, without generation.
        return self.chooses_by_score and self.task_type != "classification"

    @property
    def measurement_options(self) -> frozenset[str]:
        options = super().measurement_options
        return options | ANSWER_OPTIONS if self.measures_samples else options

    @property
    def targets(self) -> str | tuple[str, ...]:
        """Value of ``--target_modules`` in the form that `AdapterSpec` takes."""
        names = tuple(self.target_modules)
        return ALL_LINEAR if names == (ALL_LINEAR,) else names

    def warmup_steps(self, num_steps: int) -> int:
        """Return the number of warm-up steps: as given, or a share of `num_steps`, rounded up.

        Transformers rounds up too.
        """
        if self.lr_warmup_steps is not None:
            return self.lr_warmup_steps
        return math.ceil((self.warmup_ratio or 0) * num_steps)


def default_num_train_epochs(cfg: TextConfig) -> int | None:
    """Return the epochs of Tables A4 to A7, or None if the number of steps is given."""
    return EPOCHS if cfg.max_train_steps is None else None


def default_warmup_ratio(cfg: TextConfig) -> float | None:
    """Return the share of Tables A4 to A7; 0 for a constant rate; None if the steps are given."""
    if cfg.lr_warmup_steps is not None:
        return None
    return 0.0 if cfg.lr_scheduler == "constant" else WARMUP_RATIO


# Rules for derived defaults; they run after `config.derived.DERIVED_DEFAULTS`.
TEXT_DEFAULTS: tuple[Rule[TextConfig], ...] = (
    ("num_train_epochs", default_num_train_epochs),
    ("warmup_ratio", default_warmup_ratio),
    ("validation_loss_steps", default_validation_loss_steps),
)

resolve = TextConfig.resolve
