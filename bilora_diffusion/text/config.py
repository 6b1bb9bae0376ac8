"""The configuration of a text run: every option, checked and completed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from ..config.options import StoppingOptions
from ..config.run import RunConfig, without_influence
from ..core.choices import ALL_LINEAR
from ..core.errors import UserError
from ..core.fields import options_of
from ..core.files import TABLES, is_file
from ..run.heldout_part import read_part
from .options import (
    EvaluationOptions,
    TextAdapterOptions,
    TextDataOptions,
    TextMethodFlags,
    TextModelOptions,
    TextOptimizerOptions,
    TextOutputOptions,
    TextStepOptions,
)

GROUPS = (
    TextModelOptions,
    TextDataOptions,
    TextAdapterOptions,
    TextMethodFlags,
    TextStepOptions,
    StoppingOptions,
    TextOptimizerOptions,
    EvaluationOptions,
    TextOutputOptions,
)
EPOCHS = 3
WARMUP_RATIO = 0.03  # Tables A4 to A7


@dataclass(frozen=True)
class TextConfig(
    TextModelOptions,
    TextDataOptions,
    TextAdapterOptions,
    TextMethodFlags,
    TextStepOptions,
    TextOptimizerOptions,
    EvaluationOptions,
    TextOutputOptions,
    RunConfig,
):
    """Every option of the script, flat. Made by `resolve`.

    All that a run reads is decided: ``task_type`` is what the model is, ``optimizer`` is in lower
    case, and ``num_train_epochs`` is None only where steps count.
    """

    modality: ClassVar[str] = "text"
    groups: ClassVar[tuple[Any, ...]] = GROUPS
    without_influence: ClassVar[frozenset[str]] = without_influence(GROUPS)
    without_samples: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"max_predictions": 0, "eval_train_samples": 0}
    )
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

    @staticmethod
    def complete(values: dict[str, Any], given: frozenset[str]) -> dict[str, Any]:
        """Fill in what was not given, of what only text has, and the kind of the model.

        Raises:
            UserError: there is no such model, or it is of another kind than ``--task_type``.
        """
        from .models import TextSource  # which takes torch

        values = dict(values)
        if values["num_train_epochs"] is None and values["max_train_steps"] is None:
            values["num_train_epochs"] = EPOCHS
        if values["warmup_ratio"] is None and values["lr_warmup_steps"] is None:
            values["warmup_ratio"] = 0.0 if values["lr_scheduler"] == "constant" else WARMUP_RATIO
        if values["model_name_or_path"] is not None:
            model = {name: values[name] for name in options_of([TextModelOptions])}
            values["task_type"] = TextSource(TextModelOptions(**model)).kind
        return values

    @staticmethod
    def check_inputs(values: dict[str, Any]) -> None:
        """Refuse an unknown task, and what is no file of rows.

        Raises:
            UserError: one sentence with the value and the fix.
        """
        if values["task"]:
            from . import catalog

            catalog.get(values["task"])
        if values["validation_part"] is not None:
            read_part(values["validation_part"])
        for name in ("train_file", "validation_file"):
            path = Path(values[name] or "").expanduser()
            if values[name] and not (is_file(path) and path.suffix.lower() in TABLES):
                fault = "is not a file of rows" if path.exists() else "does not exist"
                kinds = ", ".join(TABLES)
                raise UserError(f'--{name} "{path}" {fault}: give one that ends in {kinds}.')

    @property
    def base_model(self) -> str:
        return self.model_name_or_path

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


resolve = TextConfig.resolve
