"""The configuration of a DreamBooth run: every option, checked and completed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from ..config.options import OptimizerOptions, StepOptions, StoppingOptions
from ..config.run import RunConfig, without_influence
from ..methods.options import AdapterOptions, MethodFlags
from . import inputs
from .families import SDXL, named
from .loss_options import DiffusionOptions, FlowOptions, PriorOptions
from .options import DataOptions, ImageOutputOptions, ModelOptions, ValidationOptions

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
    """Every option of the script, flat, and what the base model's files say. Made by `resolve`.

    All that a run reads is decided: ``optimizer`` is in lower case, ``validation_prompts`` holds
    all prompts, and ``max_train_steps`` is None only where epochs count.

    Attributes:
        pipeline: the class of the base model's pipeline.
        told_guidance: whether it is told its guidance in training.
    """

    pipeline: str = ""
    told_guidance: bool = False

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
    complete = staticmethod(inputs.complete)
    check_inputs = staticmethod(inputs.check_inputs)

    @property
    def base_model(self) -> str:
        return self.pretrained_model_name_or_path

    @property
    def leaves_unused(self) -> bool:
        # The last layer of SDXL's first encoder; what the last block of a transformer makes of text
        return self.train_text_encoder or self.pipeline != SDXL

    @property
    def family(self) -> Any:
        """Facts of the base model's kind, with the run's settings of it."""
        return named(self.pipeline, self.pretrained_model_name_or_path)(**self.family_settings)

    @property
    def family_settings(self) -> dict[str, Any]:
        """Given values of the settings that a `Family` lets a run change."""
        names = ("max_sequence_length", "guidance_scale")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def cache(self) -> Path | None:
        """Folder in which the run caches what it encodes; None where it does not."""
        return None if self.dry_run else inputs.cache_folder(self.disk_cache)

    @property
    def source(self) -> str:
        """Name or place of the training images."""
        return str(self.dataset_name or self.instance_data_dir)

    @property
    def sampled_prompts(self) -> list[str]:
        """The prompt of each validation image, in their order."""
        count = self.num_validation_images
        return [prompt for prompt in self.validation_prompts for _ in range(count)]


def resolve(argv: Sequence[str] | None = None) -> DreamBoothConfig:
    """Make the configuration of a command line of the image script (`RunConfig.resolve`)."""
    return DreamBoothConfig.resolve(argv)
