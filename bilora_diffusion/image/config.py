"""The configuration of a DreamBooth run: every option, checked and completed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self

from ..config.foreign import FOREIGN
from ..methods.options import AdapterOptions, MethodFlags
from ..run.config import RunConfig, without_influence
from ..run.options import OptimizerOptions, StepOptions, StoppingOptions
from . import inputs
from .families import SDXL
from .flow_options import FlowOptions
from .options import (
    DataOptions,
    DiffusionOptions,
    ImageOutputOptions,
    ModelOptions,
    PriorOptions,
)
from .validation_options import ValidationOptions

GROUPS = (
    ModelOptions,
    DataOptions,
    AdapterOptions,
    MethodFlags,
    StepOptions,
    StoppingOptions,
    OptimizerOptions,
    DiffusionOptions,
    FlowOptions,
    PriorOptions,
    ValidationOptions,
    ImageOutputOptions,
)


@dataclass(frozen=True)
class DreamBoothConfig(
    ModelOptions,
    DataOptions,
    DiffusionOptions,
    FlowOptions,
    PriorOptions,
    ValidationOptions,
    ImageOutputOptions,
    RunConfig,
):
    """Every option of the script, flat. Made by ``parse``, which checks and completes it.

    Then ``mixed_precision``, ``lora_alpha``, ``rho`` and ``optimizer`` (in lower case) are decided,
    ``validation_prompts`` holds all prompts, and ``max_train_steps`` is None only where epochs
    count. ``resolution`` may be None, and ``gradient_checkpointing`` is, until ``completed``.
    """

    modality: ClassVar[str] = "image"
    groups: ClassVar[tuple[Any, ...]] = GROUPS
    without_influence: ClassVar[frozenset[str]] = without_influence(GROUPS)
    without_samples: ClassVar[Mapping[str, Any]] = MappingProxyType({"num_validation_images": 0})
    alternatives: ClassVar[tuple[tuple[str, str], ...]] = (
        ("dataset_name", "instance_data_dir"),
        ("max_train_steps", "num_train_epochs"),
        ("validation_prompt", "validation_prompts"),
    )
    description: ClassVar[str] = (
        "Fine-tune Stable Diffusion XL, or a flow-matching transformer, on a few images with"
        " Bi-LoRA or LoRA. Flags of diffusers' train_dreambooth_lora_*.py keep their names and"
        " meaning; defaults are those of the Bi-LoRA paper's Table A8."
    )
    usage: ClassVar[str] = "%(prog)s --dataset {mini,HUB_ID,FOLDER} [flags]"
    foreign: ClassVar[Mapping[str, tuple[str, str]]] = MappingProxyType(FOREIGN)
    complete = staticmethod(inputs.complete)
    check_inputs = staticmethod(inputs.check_inputs)
    facts = staticmethod(inputs.facts)

    @property
    def leaves_unused(self) -> bool:
        # The last layer of SDXL's first encoder; what the last block of a transformer makes of text
        model = self.pretrained_model_name_or_path
        return self.train_text_encoder or inputs.pipeline_class(model) != SDXL

    @property
    def sampled_prompts(self) -> list[str]:
        """The prompt of each validation image, in their order."""
        count = self.num_validation_images
        return [prompt for prompt in self.validation_prompts for _ in range(count)]

    def completed(self, processes: int, side: int) -> Self:
        """With what only the opened model and the launch say.

        Args:
            processes: that train together.
            side: pixels that the pipeline was made for; used unless --resolution was given.
        """
        resolution = self.resolution or side
        checkpointing = self.gradient_checkpointing
        if checkpointing is None:
            checkpointing = inputs.default_checkpointing(resolution)
        known: dict[str, Any] = {"resolution": resolution, "gradient_checkpointing": checkpointing}
        return dataclasses.replace(self, **known, **self.scaled_rates(processes))


def parse(argv: Sequence[str] | None = None) -> DreamBoothConfig:
    """What a command line of the image script means (`RunConfig.read`)."""
    return DreamBoothConfig.read(argv)
