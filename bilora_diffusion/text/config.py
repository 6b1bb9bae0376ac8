"""The configuration of a text run: every option, checked and completed."""

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
# Default of Tables A4 to A7.
EPOCHS = 3
# Default of Tables A4 to A7.
WARMUP_RATIO = 0.03
# Options that change the score of generated answers.
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
    """All options of the script, built by `resolve`.

    All values are final: ``task_type`` is the kind of the model, ``optimizer`` is in lower case,
    and ``num_train_epochs`` is None only if the number of steps is given.
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
        "Fine-tune a T5, a causal language model or a text classifier with Bi-LoRA or LoRA. Flags"
        " that Transformers' and TRL's scripts have keep their names; defaults are those of the"
        " Bi-LoRA paper's Tables A4 to A7."
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

        cfg = derive(self, TEXT_DEFAULTS)
        # Without a model the constraints refuse the run with their own message.
        if cfg.model_name_or_path is not None:
            cfg = replace(cfg, task_type=TextSource(cfg).kind)
        return cfg

    def check_inputs(self) -> None:
        if self.task:
            from . import catalog

            catalog.get(self.task)
        if self.chooses_by_score and not self.metrics:
            raise UserError(
                f"--choose_by score is refused, since the task {self.task} has no score of its free"
                " answers: use --choose_by loss."
            )
        files = {"train_file": self.train_file, "validation_file": self.validation_file}
        for name, file in files.items():
            if not file:
                continue
            path = Path(file).expanduser()
            if not is_file(path) or path.suffix.lower() not in TABLES:
                fault = "is not a file of rows" if path.exists() else "does not exist"
                kinds = ", ".join(TABLES)
                raise UserError(f'--{name} "{path}" {fault}: give one that ends in {kinds}.')

    @property
    def base_model(self) -> str:
        return self.model_name_or_path

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the scores of answers to held-out rows, the first of which may choose."""
        from . import catalog

        if self.task:
            return catalog.get(self.task).metrics
        return catalog.FILE_METRICS[self.task_type]

    @property
    def chooses_by_score(self) -> bool:
        """True if a score of the answers decides which weights the run exports."""
        return self.depends_on_heldout and self.choose_by == BY_SCORE

    @property
    def heldout_measure(self) -> str:
        return HELDOUT_PREFIX + self.metrics[0] if self.chooses_by_score else HELDOUT_LOSS

    @property
    def measures_samples(self) -> bool:
        # A classifier has its answers with the loss.
        return self.chooses_by_score and self.task_type != "classification"

    @property
    def measurement_options(self) -> frozenset[str]:
        options = super().measurement_options
        return options | ANSWER_OPTIONS if self.measures_samples else options

    @property
    def targets(self) -> str | tuple[str, ...]:
        """``--target_modules`` for an `AdapterSpec`."""
        names = tuple(self.target_modules)
        return ALL_LINEAR if names == (ALL_LINEAR,) else names

    def warmup_steps(self, num_steps: int) -> int:
        """Warm-up steps: as given, or a share of all steps, rounded up as in Transformers."""
        if self.lr_warmup_steps is not None:
            return self.lr_warmup_steps
        return math.ceil((self.warmup_ratio or 0) * num_steps)


def default_num_train_epochs(cfg: TextConfig) -> int | None:
    """Epochs of Tables A4 to A7, unless the number of steps is given."""
    return EPOCHS if cfg.max_train_steps is None else None


def default_warmup_ratio(cfg: TextConfig) -> float | None:
    """Share of Tables A4 to A7 for schedules with a changing rate; None if steps are given."""
    if cfg.lr_warmup_steps is not None:
        return None
    return 0.0 if cfg.lr_scheduler == "constant" else WARMUP_RATIO


# They run after `config.derived.DERIVED_DEFAULTS`.
TEXT_DEFAULTS: tuple[Rule[TextConfig], ...] = (
    ("num_train_epochs", default_num_train_epochs),
    ("warmup_ratio", default_warmup_ratio),
    ("validation_loss_steps", default_validation_loss_steps),
)

resolve = TextConfig.resolve
