"""The configuration of a DreamBooth run: every option, checked and completed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

from ..config import resolving
from ..config.options import OptimizerOptions, StepOptions, StoppingOptions
from ..config.run import without_influence
from ..methods.options import AdapterOptions, MethodFlags, SingleMethodOptions
from . import inputs
from .base_model import describe
from .concept_list import with_sets_of_images
from .derived import with_model_defaults
from .families import SDXL, family_class
from .loss_options import DiffusionOptions, FlowOptions, PriorOptions
from .options import DataOptions, ImageOptions, ImageOutputOptions, ModelOptions, ValidationOptions
from .validation import ValidationSample, samples_of

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
    SingleMethodOptions,
)


@dataclass(frozen=True)
class DreamBoothConfig(ImageOptions):
    """`ImageOptions` as a run reads them; made by `resolve`.

    All that a run reads is decided: ``optimizer`` is in lower case, ``validation_prompts`` holds
    the text of all prompts, and ``max_train_steps`` is None only where epochs count.
    """

    groups: ClassVar[tuple[type, ...]] = GROUPS
    without_influence: ClassVar[frozenset[str]] = frozenset(
        {*without_influence(GROUPS), "validation_settings"}
    )
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

    @classmethod
    def resolve(cls, argv: Sequence[str] | None = None) -> Self:
        """The configuration of a command line; see `config.resolving`."""
        return resolving.resolve(cls, argv)

    def derived(self) -> Self:
        cfg = with_sets_of_images(self)
        model = describe(cfg.pretrained_model_name_or_path, cfg.revision, cfg.cache_dir)
        cfg = with_model_defaults(cfg, model)
        inputs.check_base_model(cfg, model)
        return cfg

    def check_inputs(self) -> None:
        inputs.check_inputs(self)

    @property
    def base_model(self) -> str:
        return self.pretrained_model_name_or_path

    @property
    def leaves_unused(self) -> bool:
        # SDXL does not read the last layer of its first encoder, and no transformer what its last
        # block makes of the text.
        return self.train_text_encoder or self.pipeline != SDXL

    @property
    def family(self) -> Any:
        """Facts of the base model's kind, with the run's settings of it."""
        family = family_class(self.pipeline, self.pretrained_model_name_or_path)
        return family(**self.family_settings)

    @property
    def family_settings(self) -> dict[str, Any]:
        """Given values of the settings that a `Family` lets a run change."""
        settings = {
            "max_sequence_length": self.max_sequence_length,
            "guidance_scale": self.guidance_scale,
        }
        return {name: value for name, value in settings.items() if value is not None}

    @property
    def cache(self) -> Path | None:
        """Folder in which the run caches what it encodes; None where it does not."""
        return None if self.dry_run else inputs.cache_folder(self.disk_cache)

    @property
    def concept_configs(self) -> list[Self]:
        """The configuration as each concept has it; itself where there are none."""
        if not self.concepts:
            return [self]
        return [replace(self, concepts=[], **options) for options in self.concepts]

    @property
    def source(self) -> str:
        """Name or place of the training images."""
        return str(self.dataset_name or self.instance_data_dir)

    @property
    def sampled_prompts(self) -> list[str]:
        """The prompt of each validation image, in their order."""
        return [sample.prompt for sample in self.samples]

    @property
    def samples(self) -> list[ValidationSample]:
        """How each validation image is sampled, in their order."""
        return samples_of(self)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        # Read from the options, but not to be read off them again: viewer and card need them.
        values["validation_settings"] = self.validation_settings
        if self.concepts:
            values["concepts"] = self.concepts
        return values

    def fingerprint(self) -> dict[str, Any]:
        values = super().fingerprint()
        if self.concepts:
            values["concepts"] = [
                {
                    name: value
                    for name, value in options.items()
                    if name not in self.without_influence
                }
                for options in self.concepts
            ]
        return values


resolve = DreamBoothConfig.resolve
"""Makes the configuration of a command line of the image script."""
