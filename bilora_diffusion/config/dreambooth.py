"""The configuration of a DreamBooth run: every option, checked and completed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from .checks import check
from .command_line import CommandLine
from .inputs import DataOptions, ModelOptions, PriorOptions
from .outputs import OutputOptions, ValidationOptions
from .resolve import default_checkpointing, resolve
from .training import AdapterOptions, OptimizerOptions, StepOptions

GROUPS = (
    ModelOptions,
    DataOptions,
    AdapterOptions,
    StepOptions,
    OptimizerOptions,
    PriorOptions,
    ValidationOptions,
    OutputOptions,
)

ALTERNATIVES = (
    ("dataset_name", "instance_data_dir"),
    ("max_train_steps", "num_train_epochs"),
    ("validation_prompt", "validation_prompts"),
)

WITHOUT_INFLUENCE = frozenset(
    name
    for group in (ValidationOptions, OutputOptions)
    for name in (field.name for field in fields(group))
) | {"cache_dir", "dataloader_num_workers", "local_rank", "sample_batch_size"}
"""Options that a resumed run may change freely: they do not touch what is learned."""


@dataclass(frozen=True)
class DreamBoothConfig(
    ModelOptions,
    DataOptions,
    AdapterOptions,
    StepOptions,
    OptimizerOptions,
    PriorOptions,
    ValidationOptions,
    OutputOptions,
):
    """Every option of the script, flat. Made by ``parse``, which checks and completes it.

    After ``parse``, ``mixed_precision``, ``lora_alpha`` and ``optimizer`` (in lower case)
    are decided, ``validation_prompts`` holds all prompts, and ``max_train_steps`` is None only
    where epochs count. ``resolution`` and ``gradient_checkpointing`` may be None until
    ``for_pipeline`` says what the model was made for.
    """

    @property
    def log_with(self) -> str | None:
        """The tracker for ``Accelerator(log_with=...)``."""
        return None if self.report_to == "none" else self.report_to

    def for_pipeline(self, side: int) -> DreamBoothConfig:
        """Decide what depends on the model: resolution, and gradient checkpointing with it.

        Args:
            side: pixels that the pipeline was made for; used unless --resolution was given.
        """
        resolution = self.resolution or side
        checkpointing = self.gradient_checkpointing
        if checkpointing is None:
            checkpointing = default_checkpointing(resolution)
        return dataclasses.replace(
            self, resolution=resolution, gradient_checkpointing=checkpointing
        )

    def for_processes(self, count: int) -> DreamBoothConfig:
        """Carry out ``--scale_lr`` for a run on ``count`` processes; call it once."""
        if not self.scale_lr:
            return self
        factor = self.gradient_accumulation_steps * self.train_batch_size * count
        return dataclasses.replace(self, learning_rate=self.learning_rate * factor)

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON values; the hub token is left out."""
        names = [field.name for group in GROUPS for field in fields(group)]
        values = dataclasses.asdict(self)
        return {name: values[name] for name in names if name != "hub_token"}

    def fingerprint(self) -> dict[str, Any]:
        """The options that decide what is learned: a resumed run must have the same."""
        return {k: v for k, v in self.to_dict().items() if k not in WITHOUT_INFLUENCE}


def parse(argv: Sequence[str] | None = None) -> DreamBoothConfig:
    """Read the command line (and the recipe it names), check it and complete it.

    Nothing is downloaded or loaded. ``--help`` prints and exits.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Raises:
        UserError: a value or a combination that can't be honoured; it names the fix.
    """
    line = CommandLine(
        GROUPS,
        description="Fine-tune Stable Diffusion XL on a few images with Bi-LoRA or LoRA. Flags of"
        " diffusers' train_dreambooth_lora_sdxl.py keep their names and meaning; defaults are"
        " those of the Bi-LoRA paper's Table A8.",
        usage="%(prog)s --dataset {mini,HUB_ID,FOLDER} [flags]",
    )
    values, given = line.read(argv, ALTERNATIVES)
    values = resolve(values, given)
    check(values, given, line.defaults())
    config = DreamBoothConfig(**values)
    return config if config.resolution is None else config.for_pipeline(config.resolution)
