"""The configuration of a DreamBooth run: every option, checked and completed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..config.checks import check
from ..config.command_line import CommandLine
from ..config.notes import tell
from ..config.outputs import ImageOutputOptions, ValidationOptions
from ..config.resolve import default_checkpointing, resolve
from ..config.run_config import RunConfig
from ..config.training import AdapterOptions, OptimizerOptions, StepOptions
from .checks import check_inputs
from .inputs import DataOptions, DiffusionOptions, ModelOptions, PriorOptions
from .locations import check_locations

GROUPS = (
    ModelOptions,
    DataOptions,
    AdapterOptions,
    StepOptions,
    OptimizerOptions,
    DiffusionOptions,
    PriorOptions,
    ValidationOptions,
    ImageOutputOptions,
)

ALTERNATIVES = (
    ("dataset_name", "instance_data_dir"),
    ("max_train_steps", "num_train_epochs"),
    ("validation_prompt", "validation_prompts"),
)

WITHOUT_INFLUENCE = frozenset(
    name
    for group in (ValidationOptions, ImageOutputOptions)
    for name in (field.name for field in fields(group))
) | {
    *("cache_dir", "dataloader_num_workers", "local_rank", "sample_batch_size"),
    *("cache_latents", "gradient_checkpointing", "allow_tf32"),
    "enable_xformers_memory_efficient_attention",
}
"""Options that a resumed run may change freely: they do not touch what is learned, or only in the
last digits, as another card does."""


@dataclass(frozen=True)
class DreamBoothConfig(
    ModelOptions,
    DataOptions,
    AdapterOptions,
    StepOptions,
    OptimizerOptions,
    DiffusionOptions,
    PriorOptions,
    ValidationOptions,
    ImageOutputOptions,
    RunConfig,
):
    """Every option of the script, flat. Made by ``parse``, which checks and completes it.

    After ``parse``, ``mixed_precision``, ``lora_alpha`` and ``optimizer`` (in lower case)
    are decided, ``validation_prompts`` holds all prompts, and ``max_train_steps`` is None only
    where epochs count. ``resolution`` and ``gradient_checkpointing`` may be None until
    ``for_pipeline`` says what the model was made for.
    """

    groups: ClassVar[tuple[Any, ...]] = GROUPS
    without_influence: ClassVar[frozenset[str]] = WITHOUT_INFLUENCE

    @property
    def sampled_prompts(self) -> list[str]:
        """The prompt of each validation image, in their order."""
        count = self.num_validation_images
        return [prompt for prompt in self.validation_prompts for _ in range(count)]

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
    values, notes = check(
        values, given, line.defaults(), inputs=check_inputs, locations=check_locations
    )
    tell(notes)
    config = DreamBoothConfig(**values)
    return config if config.resolution is None else config.for_pipeline(config.resolution)
